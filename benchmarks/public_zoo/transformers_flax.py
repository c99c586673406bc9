"""Flax models of transformers, each with the head that people fine-tune or sample from."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.public_zoo.specimen import Specimen, draw, draw_indices, import_optional

__all__ = ["BUILDERS"]

_HIDDEN = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 40}
_TEXT = {"vocab_size": 50, "max_position_embeddings": 40}
_ENCODER = {**_HIDDEN, **_TEXT, "type_vocab_size": 2, "pad_token_id": 1}
_LLAMA = {**_HIDDEN, **_TEXT, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
_VISION = {**_HIDDEN, "image_size": 16, "patch_size": 8}
_BART = {
    **_TEXT,
    "d_model": 24,
    "pad_token_id": 1,
    **{
        f"{side}_{key}": size
        for side in ("encoder", "decoder")
        for key, size in {"layers": 2, "attention_heads": 3, "ffn_dim": 40}.items()
    },
}
_T5 = {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}


def _tokens(length: int, prefix: str = "") -> dict[str, jax.Array]:
    """Draw two sentences, of which the second ends with two padded tokens."""
    mask = np.ones((2, length), np.int32)
    mask[1, -2:] = 0
    ids = draw_indices(2, 50, 2, length)
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": jnp.asarray(mask)}


def _text(length: int) -> dict[str, jax.Array]:
    return _tokens(length)


def _text_pair(length: int) -> dict[str, jax.Array]:
    return _tokens(length) | _tokens(length - 2, "decoder_")


def _pixels(side: int) -> dict[str, jax.Array]:
    return {"pixel_values": draw(2, 3, side, side)}


def _restore_clip() -> None:
    """Let `jnp.clip` take `a_max` again, an old name that T5 uses and that JAX has removed."""
    clip = jnp.clip

    def old_clip(x: Any, *args: Any, a_max: Any = None, **options: Any) -> Any:
        return clip(x, *args, **options) if a_max is None else clip(x, max=a_max)

    jnp.clip = old_clip


def _build(
    family: str,
    model: str,
    config: str,
    sizes: Mapping[str, Any],
    batch: Callable[[int], dict[str, jax.Array]] = _text,
    lengths: Sequence[int] = (7, 11),
) -> Specimen:
    """Build a Flax model of transformers.

    Args:
      family: folder of the model.
      model: name of its class.
      config: name of the class of its configuration.
      sizes: what the configuration is made from.
      batch: returns the keyword arguments of the model for a length.
      lengths: the length of the example, and another one if the model takes several.
    """
    module = import_optional(f"transformers.models.{family}.modeling_flax_{family}")
    settings = getattr(import_optional("transformers"), config)(**sizes)
    first, *rest = (batch(length) for length in lengths)
    _restore_clip()
    # Modules cast to their dtype. With float64 the spec is verified to the last digits.
    network = getattr(module, model)(settings, _do_init=False, dtype=jnp.dtype("float64"))
    params = jax.jit(lambda key: network.init_weights(key, network.input_shape))(jax.random.PRNGKey(0))

    def function(params: Any, batch: Mapping[str, Any]) -> Any:
        return network(**batch, params=params)[0]  # the rest repeats hidden states

    return Specimen(function, params, (first,), (rest[0],) if rest else None)


def _clip() -> Specimen:
    sizes = {"text_config": {**_HIDDEN, **_TEXT, "eos_token_id": 49}, "vision_config": _VISION}

    def batch(length: int) -> dict[str, jax.Array]:
        return _tokens(length) | _pixels(16)

    return _build("clip", "FlaxCLIPModel", "CLIPConfig", {**sizes, "projection_dim": 12}, batch)


def _speech(length: int) -> dict[str, jax.Array]:
    return {"input_values": draw(2, length)}


def _spectrum(length: int) -> dict[str, jax.Array]:
    ids = _tokens(length)["input_ids"]
    return {"input_features": draw(2, 8, 24), "decoder_input_ids": ids}


_WAV2VEC2 = {
    **_HIDDEN,
    "vocab_size": 20,
    "conv_dim": (8, 12),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 3,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
_WHISPER = {
    **{key: size for key, size in _BART.items() if key != "max_position_embeddings"},
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 20,
    "decoder_start_token_id": 2,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_GPT2 = {"vocab_size": 50, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3}
_GPT_NEO = {
    **_TEXT,
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 3,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
}
_RESNET = {"embedding_size": 8, "hidden_sizes": [12, 16], "depths": [1, 2], "layer_type": "bottleneck"}
_REGNET = {"embedding_size": 8, "hidden_sizes": [12, 16], "depths": [1, 2], "groups_width": 4}

# Family, class of the model, class of its configuration, and what else `_build` takes.
_TRANSFORMERS: dict[str, tuple[Any, ...]] = {
    "BERT": ("bert", "FlaxBertForMaskedLM", "BertConfig", _ENCODER),
    "RoBERTa": ("roberta", "FlaxRobertaForMaskedLM", "RobertaConfig", _ENCODER),
    "RoFormer": ("roformer", "FlaxRoFormerForMaskedLM", "RoFormerConfig", _ENCODER | {"embedding_size": 24}),
    "ELECTRA": ("electra", "FlaxElectraForMaskedLM", "ElectraConfig", _ENCODER | {"embedding_size": 16}),
    "ALBERT": ("albert", "FlaxAlbertForMaskedLM", "AlbertConfig", _ENCODER | {"embedding_size": 16}),
    "DistilBERT": (
        "distilbert",
        "FlaxDistilBertForMaskedLM",
        "DistilBertConfig",
        {**_TEXT, "dim": 24, "n_heads": 3, "n_layers": 2, "hidden_dim": 40},
    ),
    "BigBird, block sparse": (
        "big_bird",
        "FlaxBigBirdForMaskedLM",
        "BigBirdConfig",
        _ENCODER | {"block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 64},
        _text,
        (48,),
    ),
    "GPT-2": ("gpt2", "FlaxGPT2LMHeadModel", "GPT2Config", _GPT2),
    "GPT-Neo": ("gpt_neo", "FlaxGPTNeoForCausalLM", "GPTNeoConfig", _GPT_NEO),
    "GPT-J": ("gptj", "FlaxGPTJForCausalLM", "GPTJConfig", _GPT2 | {"rotary_dim": 4}),
    "BLOOM": (
        "bloom",
        "FlaxBloomForCausalLM",
        "BloomConfig",
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
        },  # other numbers of heads call jnp.cat
    ),
    "OPT": (
        "opt",
        "FlaxOPTForCausalLM",
        "OPTConfig",
        {key: size for key, size in _ENCODER.items() if key not in ("intermediate_size", "type_vocab_size")}
        | {"ffn_dim": 40, "word_embed_proj_dim": 24},
    ),
    "XGLM": (
        "xglm",
        "FlaxXGLMForCausalLM",
        "XGLMConfig",
        {**_TEXT, "d_model": 24, "ffn_dim": 40, "num_layers": 2, "attention_heads": 3},
    ),
    "Llama": ("llama", "FlaxLlamaForCausalLM", "LlamaConfig", _LLAMA),
    "Mistral": ("mistral", "FlaxMistralForCausalLM", "MistralConfig", _LLAMA | {"sliding_window": 4}),
    "Gemma": ("gemma", "FlaxGemmaForCausalLM", "GemmaConfig", _LLAMA | {"head_dim": 8}),
    "T5": ("t5", "FlaxT5ForConditionalGeneration", "T5Config", _T5, _text_pair),
    "mT5, gated": (
        "mt5",
        "FlaxMT5ForConditionalGeneration",
        "MT5Config",
        _T5 | {"feed_forward_proj": "gated-gelu"},
        _text_pair,
    ),
    "LongT5": (
        "longt5",
        "FlaxLongT5ForConditionalGeneration",
        "LongT5Config",
        _T5 | {"local_radius": 3},
        _text_pair,
    ),
    "BART": ("bart", "FlaxBartForConditionalGeneration", "BartConfig", _BART, _text_pair),
    "mBART": ("mbart", "FlaxMBartForConditionalGeneration", "MBartConfig", _BART, _text_pair),
    "Pegasus": ("pegasus", "FlaxPegasusForConditionalGeneration", "PegasusConfig", _BART, _text_pair),
    "Marian": (
        "marian",
        "FlaxMarianMTModel",
        "MarianConfig",
        _BART | {"decoder_vocab_size": 50, "decoder_start_token_id": 2},
        _text_pair,
    ),
    "Whisper": (
        "whisper",
        "FlaxWhisperForConditionalGeneration",
        "WhisperConfig",
        _WHISPER,
        _spectrum,
    ),
    "wav2vec 2.0": ("wav2vec2", "FlaxWav2Vec2ForCTC", "Wav2Vec2Config", _WAV2VEC2, _speech, (400, 560)),
    "ViT": ("vit", "FlaxViTForImageClassification", "ViTConfig", _VISION, _pixels, (16,)),
    "BEiT": (
        "beit",
        "FlaxBeitForImageClassification",
        "BeitConfig",
        _VISION | {"use_relative_position_bias": True, "use_absolute_position_embeddings": False},
        _pixels,
        (16,),
    ),
    "DINOv2": (
        "dinov2",
        "FlaxDinov2ForImageClassification",
        "Dinov2Config",
        _VISION | {"use_swiglu_ffn": True},
        _pixels,
        (16,),
    ),
    "ResNet": ("resnet", "FlaxResNetForImageClassification", "ResNetConfig", _RESNET, _pixels, (32, 48)),
    "RegNet": ("regnet", "FlaxRegNetForImageClassification", "RegNetConfig", _REGNET, _pixels, (32, 48)),
}

BUILDERS: dict[str, Callable[[], Specimen]] = {
    **{name: partial(_build, *arguments) for name, arguments in _TRANSFORMERS.items()},
    "CLIP": _clip,
}
