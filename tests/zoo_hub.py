"""The zoo's timm and transformers architectures: without weights, from configurations written here, both optional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo_suite import Entry, told_loss
from zoo_torch import CLASSES, images

BATCH, LENGTH, VOCABULARY = 2, 6, 30


# ---- timm -------------------------------------------------------------------------------------------------


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=CLASSES, **options)

    return make


def vision(name: str, size: int = 64, remark: str = "", **options: Any) -> Entry:
    return Entry(timm_model(name, **options), lambda: images(size), remark=remark)


TIMM = {
    "resnet10t": vision("resnet10t", drop_path_rate=0.1),
    "test_nfnet": vision("test_nfnet", remark="standardized weights"),
    "test_byobnet": vision("test_byobnet"),
    "test_efficientnet_evos": vision("test_efficientnet_evos", remark="normalization and activation in one module"),
    "mobilenetv4_conv_small_050": vision("mobilenetv4_conv_small_050"),
    "ghostnet_050": vision("ghostnet_050"),
    "mobileone_s0": vision("mobileone_s0", remark="parallel branches"),
    "convnextv2_atto": vision("convnextv2_atto", drop_path_rate=0.1, depths=(1, 1, 1, 1)),
    "inception_next_atto": vision("inception_next_atto", depths=(1, 1, 1, 1)),
    "fasternet_t0": vision("fasternet_t0", depths=(1, 1, 1, 1)),
    "test_mambaout": vision("test_mambaout"),
    "hrnet": vision("hrnet_w18_small", remark="four resolutions at once"),
    "test_vit": vision("test_vit", size=160),
    "deit_tiny_distilled": vision(
        "deit_tiny_distilled_patch16_224", img_size=64, embed_dim=24, depth=2, remark="two heads"
    ),
    "cait": vision("cait_xxs24_224", img_size=64, embed_dim=24, depth=2, num_heads=2, remark="parameters in blocks"),
    "xcit_nano": vision("xcit_nano_12_p16_224", img_size=64, embed_dim=32, depth=2, num_heads=2),
    "swinv2_cr": vision(
        "swinv2_cr_tiny_224", img_size=64, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2)
    ),
    "mobilevitv2_050": vision("mobilevitv2_050"),
    "edgenext_xx_small": vision("edgenext_xx_small"),
    "mixer": vision("mixer_s32_224", img_size=64),
    "gmlp": vision("gmlp_ti16_224", img_size=64),
    "sequencer2d": vision("sequencer2d_s", remark="LSTM over rows and columns"),
    "levit": vision("levit_128s", size=224),
    "hiera": vision("hiera_tiny_224", img_size=64, embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)),
}


# ---- transformers -----------------------------------------------------------------------------------------


def from_config(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        options.setdefault("attn_implementation", "eager")
        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return make


def checkpointed(make: Callable[[], nn.Module], use_reentrant: bool) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        made = make()
        made.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        made.enable_input_require_grads()
        return made

    return model


def ids(low: int = 3) -> Tensor:
    return torch.randint(low, VOCABULARY, (BATCH, LENGTH))


def text() -> dict[str, Tensor]:
    return {"input_ids": ids(), "labels": ids()}


def masked_text() -> dict[str, Tensor]:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, 4:] = 0
    return {**text(), "attention_mask": mask}


def sentences() -> dict[str, Tensor]:
    return {"input_ids": ids(), "labels": torch.tensor([0, 1])}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": torch.tensor([0, 1])}


def speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(BATCH, 8, 40), "labels": ids()}


def sound() -> dict[str, Tensor]:
    return {"input_values": torch.randn(BATCH, 800), "labels": torch.tensor([0, 1])}


def captions() -> dict[str, Any]:
    return {"input_ids": ids(), "pixel_values": torch.randn(BATCH, 3, 32, 32), "return_loss": True}


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
PICTURE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}

LLAMA = from_config("LlamaForCausalLM", "LlamaConfig", **SMALL, num_key_value_heads=1, attn_implementation="sdpa")

TRANSFORMERS = {
    "Bert": Entry(from_config("BertForMaskedLM", "BertConfig", **SMALL), masked_text, told_loss, remark="encoder"),
    "Roberta": Entry(
        from_config("RobertaForSequenceClassification", "RobertaConfig", **SMALL),
        sentences,
        told_loss,
        remark="encoder",
    ),
    "Deberta v2": Entry(
        from_config(
            "DebertaV2ForMaskedLM", "DebertaV2Config", **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"]
        ),
        text,
        told_loss,
        remark="encoder",
    ),
    "Albert": Entry(
        from_config("AlbertForMaskedLM", "AlbertConfig", **SMALL, embedding_size=8),
        text,
        told_loss,
        remark="encoder; one layer called twice",
    ),
    "GPT-2": Entry(
        from_config(
            "GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, bos_token_id=1,
            eos_token_id=2,
        ),
        text,
        told_loss,
        remark="decoder",
    ),
    "Llama": Entry(LLAMA, text, told_loss, remark="decoder; grouped queries"),
    "Llama, checkpoints": Entry(
        checkpointed(LLAMA, use_reentrant=False), text, told_loss, remark="decoder; blocks recomputed in the backward"
    ),
    "Llama, reentrant checkpoints": Entry(
        checkpointed(LLAMA, use_reentrant=True),
        text,
        told_loss,
        remark="decoder; cotangents compared with those without checkpoints",
        plain=LLAMA,
    ),
    "Gemma 2": Entry(
        from_config("Gemma2ForCausalLM", "Gemma2Config", **SMALL, num_key_value_heads=1, head_dim=8),
        text,
        told_loss,
        remark="decoder; tied weights",
    ),
    "T5": Entry(
        from_config("T5ForConditionalGeneration", "T5Config", **T5),
        text,
        told_loss,
        remark="encoder-decoder; shared embedding",
    ),
    "Bart": Entry(
        from_config("BartForConditionalGeneration", "BartConfig", **BART), text, told_loss, remark="encoder-decoder"
    ),
    "Mixtral": Entry(
        from_config(
            "MixtralForCausalLM", "MixtralConfig", **SMALL, num_key_value_heads=1, num_local_experts=4,
            output_router_logits=True, experts_implementation="eager",
        ),
        text,
        told_loss,
        remark="mixture of experts",
    ),
    "Switch Transformers": Entry(
        from_config(
            "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", **T5, num_experts=4,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        ),
        text,
        told_loss,
        remark="mixture of experts, encoder-decoder",
    ),
    "Mamba": Entry(
        from_config(
            "MambaForCausalLM", "MambaConfig", vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2
        ),
        text,
        told_loss,
        remark="state space",
    ),
    "Mamba 2": Entry(
        from_config(
            "Mamba2ForCausalLM", "Mamba2Config", vocab_size=VOCABULARY, hidden_size=16, state_size=4, head_dim=8,
            num_heads=4, n_groups=2, num_hidden_layers=2, chunk_size=4,
        ),
        text,
        told_loss,
        remark="state space",
    ),
    "Qwen 3 Next": Entry(
        from_config(
            "Qwen3NextForCausalLM", "Qwen3NextConfig", **SMALL, num_key_value_heads=1, head_dim=8, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
            linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"], experts_implementation="eager",
        ),
        text,
        told_loss,
        remark="mixture of experts, linear attention",
    ),
    "FNet": Entry(from_config("FNetForMaskedLM", "FNetConfig", **SMALL), text, told_loss, remark="encoder; Fourier"),
    "I-BERT": Entry(
        from_config("IBertForMaskedLM", "IBertConfig", **SMALL, quant_mode=True),
        text,
        told_loss,
        torch.float32,
        remark="encoder; quantized by functions that give no gradient to some of their inputs",
    ),
    "Perceiver": Entry(
        from_config(
            "PerceiverForMaskedLM", "PerceiverConfig", vocab_size=VOCABULARY, num_latents=4, d_latents=16, d_model=16,
            num_self_attends_per_block=1, num_self_attention_heads=2, num_cross_attention_heads=2,
            max_position_embeddings=LENGTH, qk_channels=16, v_channels=16,
        ),
        lambda: {"inputs": ids(), "labels": ids()},
        told_loss,
        remark="encoder; a module called with None",
    ),
    "ViT": Entry(
        from_config("ViTForImageClassification", "ViTConfig", **PICTURE), pictures, told_loss, remark="vision"
    ),
    "Swin": Entry(
        from_config(
            "SwinForImageClassification", "SwinConfig", image_size=32, patch_size=2, embed_dim=8, depths=[2, 2],
            num_heads=[2, 2], window_size=4,
        ),
        pictures,
        told_loss,
        remark="vision",
    ),
    "CLIP": Entry(
        from_config(
            "CLIPModel", "CLIPConfig", text_config=SMALL, vision_config=PICTURE, projection_dim=8
        ),
        captions,
        told_loss,
        remark="vision and text",
    ),
    "Whisper": Entry(
        from_config(
            "WhisperForConditionalGeneration", "WhisperConfig", **BART, num_mel_bins=8, max_source_positions=20,
            max_target_positions=10,
        ),
        speech,
        told_loss,
        remark="speech, encoder-decoder",
    ),
    "Wav2Vec2": Entry(
        from_config(
            "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **SMALL, conv_dim=(8, 8), conv_stride=(5, 4),
            conv_kernel=(10, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, mask_time_length=2, classifier_proj_size=8,
        ),
        sound,
        told_loss,
        remark="speech; draws from NumPy",
    ),
}  # fmt: skip
