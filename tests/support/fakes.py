"""A small problem and solver for tests of the runner; they use all state that it may disturb."""

import copy

import torch
from torch.utils.data import DataLoader, TensorDataset

from bilevel import Data, Interval, Positive, Problem, Services, Solution, Solver, Space, stream
from bilevel.solver import initial_state

STEPS_PER_EPOCH = 6
BATCH = 2


class FakeProblem(Problem):
    """Least squares with validation from a DataLoader, which draws from the global generator."""

    def __init__(self, test=True):
        self.space = Space(
            decay=Positive(init=0.01),
            drop=Interval(low=0.0, high=0.9, init=0.3, differentiable=False),
        )
        self.with_test = test

    def init(self, generator):
        return {"w": torch.randn(3, generator=generator)}, {"count": torch.zeros(())}

    def data(self, device, generator):
        g = torch.Generator().manual_seed(5)
        x, w = torch.randn(20, 3, generator=g), torch.tensor([1.0, -2.0, 0.5])
        y = x @ w + 0.1 * torch.randn(20, generator=g)
        valid = DataLoader(TensorDataset(x[12:16], y[12:16]), batch_size=BATCH)
        train = stream((x[:12], y[:12]), BATCH, generator, device=device)
        test = stream((x[16:], y[16:]), BATCH, generator, name="test") if self.with_test else None
        return Data(train, stream(valid, BATCH, generator, name="valid"), test)

    def predict(self, hypers, params, carry, batch, *, train, generator):
        x = batch[0]
        if train:
            keep = torch.rand(x.shape, generator=generator, device=x.device) >= hypers["drop"]
            x = x * keep
            carry = {"count": carry["count"] + 1}
        return x @ params["w"], carry

    def inner_objective(self, hypers, params, prediction, batch):
        return (prediction - batch[1]).pow(2).mean() + hypers["decay"] * params["w"].pow(2).sum()

    def outer_objective(self, hypers, params, prediction, batch):
        return (prediction - batch[1]).pow(2).mean()

    def metrics(self, hypers, params, prediction, batch):
        error = prediction - batch[1]
        return {"loss": error.pow(2), "accuracy": error.abs() < 0.5}


class FakeSolver(Solver):
    """SGD on w and, after warm-up, a random walk of u; `hooks[step]` is called after that step."""

    def __init__(self, inner_steps=4, rate=0.05, poison_at=None, hooks=None):
        self.inner_steps, self.rate, self.poison_at, self.hooks = (
            inner_steps,
            rate,
            poison_at,
            hooks or {},
        )
        self.rounds = []
        self.epochs = []

    def setup(self, problem, data, device, generator, services=None):
        self.services = services or Services()
        self.problem, self.data, self.generator, self.device = problem, data, generator, device
        self.params, self.carry = initial_state(problem, device, generator)
        self.u = problem.space.init().to(device)

    def step(self, *, warmup=False, limit=None):
        taken = min(self.inner_steps, limit or self.inner_steps)
        self.rounds.append((self.inner_count, taken, warmup))
        for _ in range(taken):
            w = self.params["w"].requires_grad_()
            hypers = self.problem.space.constrain(self.u)
            loss, self.carry = self.problem.inner_loss(
                hypers, {"w": w}, self.carry, self.data.train.next(), self.generator
            )
            if self.inner_count == self.poison_at:
                loss = loss * torch.nan
            self.services.watch(loss, self.inner_count)
            (gradient,) = torch.autograd.grad(loss, w)
            noise = 0.01 * torch.rand(3).to(
                self.device
            )  # from the global state, as a user's nn.Dropout would
            with torch.no_grad():
                w -= self.rate * (gradient + noise)  # in place, as torch.optim does
            self.inner_count += 1
            self.hooks.get(self.inner_count, lambda: None)()
        if not warmup:
            self.data.valid.next()
            self.outer_count += 1
            self.u = self.u + 0.1 * torch.randn(2, generator=self.generator, device=self.device)
        return {"inner_loss": loss.detach()}

    def solution(self):
        params = {name: p.detach() for name, p in self.params.items()}
        return Solution(self.problem.space.constrain(self.u), params, self.carry)

    def scales(self):
        return {name: torch.ones(()) for name in self.problem.space}

    def epoch_ended(self, valid_loss):
        self.epochs.append((self.inner_count, valid_loss))
        self.rate *= 0.9

    def state_dict(self):
        state = {
            "u": self.u,
            "params": self.solution().params,
            "carry": self.carry,
            "rate": self.rate,
        }
        state["rng"] = self.generator.get_state()
        return {**state, "inner_count": self.inner_count, "outer_count": self.outer_count}

    def load_state_dict(self, state):
        state = copy.deepcopy(state)
        self.generator.set_state(state.pop("rng"))
        for name, value in state.items():
            setattr(self, name, value)
