"""Small instances of known architectures, built from configurations: no weights are loaded."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel import ModuleProblem, Positive, Space, squared_norm

EXAMPLES, TOKENS, VOCABULARY = 6, 5, 20


class Architecture(NamedTuple):
    """A network and the kind of its inputs: "vectors", "images" or "ids"."""

    package: str
    make: Callable[[], nn.Module]
    inputs: str


class Trained(ModuleProblem):
    """Cross-entropy of the first three outputs, with weight decay, in float64."""

    def __init__(self, architecture: Architecture) -> None:
        torch.manual_seed(0)
        module = architecture.make().double()
        x, labels = inputs(architecture.inputs), torch.arange(EXAMPLES) % 3
        space = Space(decay=Positive(init=0.1))
        super().__init__(module, space, (x, labels), (x.clone(), labels), batch_size=EXAMPLES)

    def inner_objective(
        self, hypers: Any, params: Any, prediction: Tensor, batch: tuple[Tensor, Tensor]
    ) -> Tensor:
        penalty = (hypers["decay"] * squared_norm(params)).mean()
        return self.outer_objective(hypers, params, prediction, batch) + penalty

    def outer_objective(
        self, hypers: Any, params: Any, prediction: Tensor, batch: tuple[Tensor, Tensor]
    ) -> Tensor:
        return F.cross_entropy(prediction.flatten(1)[:, :3], batch[1])


def inputs(kind: str) -> Tensor:
    """Return a batch of random inputs."""
    draws = torch.Generator().manual_seed(0)
    if kind == "ids":
        return torch.randint(VOCABULARY, (EXAMPLES, TOKENS), generator=draws)
    shape = (EXAMPLES, 3, 32, 32) if kind == "images" else (EXAMPLES, TOKENS, 8)
    return torch.randn(shape, generator=draws, dtype=torch.float64)


class Applied(nn.Module):
    """A module with its tensor output; `call` makes it from the input."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)


def _attend(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x, x, need_weights=False)[0]


def _decode(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x.flip(1))


def _first(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)[0]


def _output(module: nn.Module, x: Tensor) -> Tensor:
    found = module(x)
    return found["logits"] if "logits" in found else found["last_hidden_state"]


def layer(name: str, call: Callable[[nn.Module, Tensor], Any], *args: Any, **options: Any) -> Any:
    """Return a layer of `torch.nn`."""
    return Applied(getattr(nn, name)(*args, **options), call)


def torchvision_model(name: str) -> nn.Module:
    """Return a small network of torchvision, made by the class that its functions call."""
    from torchvision import models
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.efficientnet import MBConvConfig
    from torchvision.models.resnet import BasicBlock
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    three: dict[str, Any] = {"num_classes": 3}
    swin = partial(models.SwinTransformer, [2, 2], 8, [2, 2], [2, 2], [4, 4], **three)
    if name == "vit":
        return models.VisionTransformer(32, 8, 2, 2, 16, 16, **three)
    if name == "swin":
        return swin()
    if name == "swin_v2":
        return swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)
    if name == "convnext":
        return models.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], **three)
    if name == "efficientnet":
        blocks = [MBConvConfig(1, 3, 1, 32, 8, 1, 1, 1), MBConvConfig(2, 3, 2, 8, 8, 1, 1, 1)]
        return models.EfficientNet(blocks, 0.2, **three)
    return models.ResNet(BasicBlock, [1, 1, 1, 1], **three)


def timm_model(name: str, **options: Any) -> nn.Module:
    """Return a small network of timm."""
    import timm

    return timm.create_model(name, num_classes=3, **options)


def transformers_model(config: str, model: str, **options: Any) -> nn.Module:
    """Return a small network of transformers, from a configuration."""
    import transformers

    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        options.setdefault(token, None)
    made = getattr(transformers, config)(**options)
    return Applied(getattr(transformers, model)(made), _output)


def lora_model(**options: Any) -> nn.Module:
    """Return a language model with low-rank adapters, which are all that is trained."""
    import peft

    base = transformers_model("LlamaConfig", "LlamaForCausalLM", **options).module
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return Applied(peft.get_peft_model(base, adapters), _output)


WORDS: dict[str, Any] = {"vocab_size": VOCABULARY}
BERT = WORDS | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
DISTILBERT = WORDS | {
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 16,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
GPT2 = WORDS | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
OPT = WORDS | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 16,
    "max_position_embeddings": 16,
    "word_embed_proj_dim": 16,
}
LLAMA = WORDS | {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
T5 = WORDS | {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}
TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
TIMM_SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (2, 2),
}

_ENCODER = {"batch_first": True}
ARCHITECTURES = {
    "nn.LSTM": Architecture("torch", partial(layer, "LSTM", _first, 8, 4, **_ENCODER), "vectors"),
    "nn.GRU": Architecture("torch", partial(layer, "GRU", _first, 8, 4, **_ENCODER), "vectors"),
    "nn.MultiheadAttention": Architecture(
        "torch", partial(layer, "MultiheadAttention", _attend, 8, 2, **_ENCODER), "vectors"
    ),
    "nn.TransformerEncoderLayer": Architecture(
        "torch", partial(nn.TransformerEncoderLayer, 8, 2, 16, **_ENCODER), "vectors"
    ),
    "nn.TransformerDecoderLayer": Architecture(
        "torch", partial(layer, "TransformerDecoderLayer", _decode, 8, 2, 16, **_ENCODER), "vectors"
    ),
    "nn.RMSNorm": Architecture(
        "torch", lambda: nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 3)), "vectors"
    ),
    "nn.Bilinear": Architecture(
        "torch", lambda: Applied(nn.Bilinear(8, 8, 3), lambda m, x: m(x, x)), "vectors"
    ),
    **{
        f"torchvision {name}": Architecture("torchvision", partial(torchvision_model, name), kind)
        for name, kind in dict.fromkeys(
            ("resnet", "efficientnet", "convnext", "vit", "swin", "swin_v2"), "images"
        ).items()
    },
    "timm vit": Architecture(
        "timm", partial(timm_model, "vit_tiny_patch16_224", **TIMM_VIT), "images"
    ),
    "timm swin": Architecture(
        "timm", partial(timm_model, "swin_tiny_patch4_window7_224", **TIMM_SWIN), "images"
    ),
    "timm convnext": Architecture(
        "timm", partial(timm_model, "convnext_tiny", depths=[1] * 4, dims=[4, 8, 8, 8]), "images"
    ),
    **{
        name: Architecture("transformers", partial(transformers_model, config, model, **options), k)
        for name, config, model, options, k in [
            ("BERT", "BertConfig", "BertForSequenceClassification", BERT, "ids"),
            (
                "DistilBERT",
                "DistilBertConfig",
                "DistilBertForSequenceClassification",
                DISTILBERT,
                "ids",
            ),
            ("GPT-2", "GPT2Config", "GPT2LMHeadModel", GPT2, "ids"),
            ("OPT", "OPTConfig", "OPTForCausalLM", OPT, "ids"),
            ("Llama", "LlamaConfig", "LlamaForCausalLM", LLAMA, "ids"),
            ("Qwen2", "Qwen2Config", "Qwen2ForCausalLM", LLAMA, "ids"),
            ("T5 encoder", "T5Config", "T5EncoderModel", T5, "ids"),
            ("transformers ViT", "ViTConfig", "ViTForImageClassification", VIT, "images"),
        ]
    },
    "Llama with LoRA": Architecture("peft", partial(lora_model, **LLAMA), "ids"),
}
"""Architectures by name."""
