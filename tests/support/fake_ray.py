"""A stand-in for Ray, so that its launcher is tested where Ray is not installed.

A task is a forked process, and as many run at a time as there are cores. As in Ray, arguments and
results are pickled, a task whose process dies runs again unless `max_retries=0`, and `cancel` is a
SIGINT for a task that runs.
"""

import os
import pickle
import signal
import sys
import time
import warnings
from multiprocessing import Pipe
from types import ModuleType
from typing import NamedTuple

import pytest

cloudpickle = pytest.importorskip("cloudpickle")


class WorkerCrashedError(Exception):
    pass


class TaskCancelledError(Exception):
    pass


class OutOfMemoryError(Exception):
    pass


class NodeDiedError(Exception):
    pass


class LocalRayletDiedError(Exception):
    pass


class Task:
    """A call of a function, with its process and its result."""

    def __init__(self, function, arguments, options):
        self.call = cloudpickle.dumps((function, arguments))
        self.tries = 1 + options.get("max_retries", 3)
        self.pid = self.pipe = self.result = self.error = None

    def start(self):
        self.tries -= 1
        self.pipe, answer = Pipe(duplex=False)
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads; the child uses none
            self.pid = os.fork()
        if self.pid:
            answer.close()
            return
        try:
            answer.send_bytes(cloudpickle.dumps(self.answer()))
        finally:
            os._exit(0)

    def answer(self):
        try:
            function, arguments = pickle.loads(self.call)
            return function(*arguments), None
        except KeyboardInterrupt:
            return None, TaskCancelledError()
        except Exception as error:
            return None, error

    def ended(self):
        """Return whether there is a result or an error; start the task again if it has died."""
        if self.result is None and self.error is None and self.pid and self.pipe.poll():
            try:
                self.result, self.error = pickle.loads(self.pipe.recv_bytes())
            except EOFError:
                self.pid = os.waitpid(self.pid, 0) and None
                if not self.tries:
                    self.error = WorkerCrashedError("the process is gone")
        return self.result is not None or self.error is not None


class Function(NamedTuple):
    ray: "FakeRay"
    function: object
    given: dict

    def options(self, **given):
        self.ray.options.append(given)
        return self._replace(given=given)

    def remote(self, *arguments):
        self.ray.tasks.append(Task(self.function, arguments, self.given))
        return self.ray.tasks[-1]


class FakeRay(ModuleType):
    """The module `ray`, with the part of its interface that the launcher uses.

    Args:
        cpus: the cores of its only machine.
        refusal: an error that `init` raises.

    Attributes:
        calls: the address, the arguments and the environment of each `init`, and each `shutdown`.
        masks: the signals that the processes of each `init` would not receive.
        options: the options of each function.
    """

    def __init__(self, cpus=2, refusal=None):
        super().__init__("ray")
        self.cpus, self.refusal = cpus, refusal
        self.calls, self.options, self.tasks, self.masks, self.connected = [], [], [], [], False
        self.exceptions = ModuleType("ray.exceptions")
        for error in (WorkerCrashedError, TaskCancelledError, OutOfMemoryError, NodeDiedError):
            setattr(self.exceptions, error.__name__, error)
        self.exceptions.LocalRayletDiedError = LocalRayletDiedError

    def install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", self)
        monkeypatch.setitem(sys.modules, "ray.exceptions", self.exceptions)

    def init(self, address, **arguments):
        self.calls.append((address, arguments, dict(os.environ)))
        self.masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray replaces the handler
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray leaves it there
        if self.refusal is not None:
            raise self.refusal
        self.connected = True

    def shutdown(self):
        self.calls.append("shutdown")
        self.connected = False
        for task in self.tasks:
            if task.pid and not task.ended():
                os.kill(task.pid, signal.SIGKILL)

    def is_initialized(self):
        return self.connected

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": float(self.cpus)}}]

    def remote(self, function):
        return Function(self, function, {})

    def wait(self, tasks, timeout):
        end = time.monotonic() + timeout
        while True:
            running = sum(bool(task.pid) and not task.ended() for task in tasks)
            for task in tasks:
                if not task.pid and not task.ended() and running < self.cpus:
                    task.start()
                    running += 1
            done = [task for task in tasks if task.ended()][:1]
            if done or time.monotonic() > end:
                return done, [task for task in tasks if task not in done]
            time.sleep(0.01)

    def get(self, task):
        if task.error is not None:
            raise task.error
        return task.result

    def cancel(self, task):
        if task.pid:
            os.kill(task.pid, signal.SIGINT)
        else:
            task.error = TaskCancelledError()
