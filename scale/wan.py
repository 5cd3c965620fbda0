"""Wan 2.1's published companions: its video VAE and its text encoder.

At toy scale PatchCodec and WordEncoder (data.py) stand in with the same interfaces. Needs
requirements-wan.txt: the models are diffusers' AutoencoderKLWan and transformers' UMT5EncoderModel.
Their weights are read here, official or diffusers' names alike, and every name and shape is
checked: a model whose weights were completed at random would encode without a word.
"""
import contextlib
import itertools
import sys
from pathlib import Path

import torch

from utils.errors import UsageError, first_line, require
from utils.files import read_json
from utils.layouts import listed, transformers_name
from utils.weights import (Weights, check_names, check_sound, dtype_of, open_tensors, shape_of)

NEGATIVE = (  # Wan's own negative prompt
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走")


@contextlib.contextmanager
def loading(path, remedy="compare its config.json with the published one"):
    """One sentence for what can go wrong while a published model is made from its settings."""
    try:
        yield
    except UsageError:
        raise
    except ImportError as error:
        raise UsageError(f"{error}: pip install -r requirements-wan.txt") from None
    except Exception as error:  # each library has its own
        raise UsageError(f"the model in {path} cannot be loaded ({first_line(error)}): "
                         f"{remedy}") from None


def settings_in(config):
    """What a config.json says; UsageError if it is no object."""
    settings = read_json(config)
    require(isinstance(settings, dict), f"{config} holds no settings: download it again")
    return settings


def whole(weight):
    """A tensor, read from disk if it has not been."""
    return weight[...] if hasattr(weight, "get_shape") else weight


def fill(model, tensors, where, dtype=None):
    """Give a model on the meta device its tensors: every one of them, and no other. `dtype`: cast
    to it; None: as stored. Returns the model, which learns nothing."""
    check_names(model, Weights(tensors, where), where, "download it again, or compare its "
                "config.json with the published one")
    tensors = {name: whole(weight).to(dtype) for name, weight in tensors.items()}
    for name, tensor in tensors.items():
        check_sound(name, tensor, where)
    first = {}  # the first name of every parameter, for one of transformers' has two
    for name, p in model.named_parameters(remove_duplicate=False):
        first.setdefault(p, name)
    state = {name: tensors[first[p]] for name, p in
             model.named_parameters(remove_duplicate=False)}
    model.load_state_dict(state, strict=False, assign=True)
    left = [name for name, x in (*model.named_parameters(), *model.named_buffers()) if x.is_meta]
    require(not left, f"{where} leaves {', '.join(left[:5])} unset: pip install -r "
            "requirements-wan.txt for the versions it was tried with")
    return model.eval().requires_grad_(False)


def one_of(folder, pattern, what):
    """The one file of a folder that fits a pattern, or None; UsageError if there are several."""
    found = sorted(p for p in folder.glob(pattern) if not p.name.startswith(".")
                   and p.suffix in (".pth", ".safetensors"))
    require(len(found) < 2, f"{folder} holds {len(found)} {what}s ({listed(found)}): name one of "
            "them")
    return found[0] if found else None


# ---------------------------------------------------------------- the video VAE

def find_vae(path):
    """(file or folder of the VAE's weights, its config dict or None) in what `path` names: the VAE
    itself, a folder of diffusers' or official layout. UsageError if there is none."""
    path = Path(path)
    require(path.exists(), f"{path} does not exist: --vae takes Wan's VAE, a folder or a file")
    if path.is_dir() and (path / "vae").is_dir():
        path = path / "vae"
    if path.is_dir():
        official = one_of(path, "*[Vv][Aa][Ee]*", "VAE")
        if official:
            return (official, None) if official.suffix == ".pth" else find_vae(official)
        config = path / "config.json"
        require(config.is_file(), f"{path} holds no VAE: name the folder vae of a -Diffusers "
                "download, or Wan2.1_VAE.pth of the official one")
    else:
        config = path.parent / "config.json"
    settings = settings_in(config) if config.is_file() else {}
    kind = settings.get("_class_name", "AutoencoderKLWan")
    if path.is_file() and kind != "AutoencoderKLWan":  # beside the network's config.json
        return path, None
    require(kind == "AutoencoderKLWan", f"{path} holds {kind}, which is no VAE of Wan's: name the "
            "folder vae of a -Diffusers download, or Wan2.1_VAE.pth of the official one")
    return path, settings or None


def vae_settings(tensors, where):
    """AutoencoderKLWan's settings for an official VAE, which has no config.json."""
    width, channels = tensors["encoder.conv_in.weight"], tensors["post_quant_conv.weight"]
    latent = shape_of(channels)[0]
    require(latent == 16, f"{where} is a VAE of {latent} channels (Wan 2.2's has 48), and "
            "Wan 2.1's has 16: name Wan2.1_VAE.pth")
    return {"base_dim": shape_of(width)[0]}


class WanCodec:
    """Wan's video VAE behind the codec interface: 1 + 4 k frames <-> 1 + k latent frames.

    path: see find_vae()"""
    ratio = 4  # frames per latent frame, after the first

    def __init__(self, path, device="cpu"):
        where, settings = find_vae(path)
        with loading(where):
            from diffusers import AutoencoderKLWan
            from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
            tensors, source, _ = open_tensors(where, companions=True)
            if "conv1.weight" in tensors:  # the official names
                tensors = convert_wan_vae_to_diffusers(tensors)
                settings = settings or vae_settings(tensors, where)
            require("encoder.conv_in.weight" in tensors, f"{where} holds no VAE: its names are "
                    f"{', '.join(sorted(tensors)[:3])} ...; name the folder vae of a -Diffusers "
                    "download, or Wan2.1_VAE.pth of the official one")
            print(f"VAE: {Weights(tensors, where, source).note()}")
            settings = settings or vae_settings(tensors, where)
            require(not (settings.get("is_residual") or settings.get("patch_size")), f"{where} is "
                    "Wan 2.2's VAE: the networks here take Wan 2.1's")
            with torch.device("meta"):
                vae = AutoencoderKLWan.from_config(settings)
            vae = fill(vae, tensors, where, torch.float32)
            require(len(vae.config.latents_mean) == len(vae.config.latents_std)
                    == vae.config.z_dim, f"{where} has {vae.config.z_dim} channels, its config.json"
                    " mean and std of another number: compare it with the published one")
        self.vae, self.channels = vae.to(device), vae.config.z_dim
        self.mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)

    def encode(self, video):
        """(b, 1 + 4 k, 3, H, W) in [-1, 1] -> (b, 1 + k, c, H / 8, W / 8), normalised"""
        z = self.vae.encode(video.transpose(1, 2).to(self.mean.device)).latent_dist.mode()
        return ((z - self.mean) / self.std).transpose(1, 2)

    def decode(self, latents):
        """The inverse: (b, 1 + k, c, h, w) -> (b, 1 + 4 k, 3, H, W)"""
        return self.decoder()(latents)

    def decoder(self):
        """decode() for a stream, chunk by chunk: a callable that continues where its last call
        ended, at constant memory."""
        vae, first = self.vae, itertools.chain([True], itertools.repeat(False))
        vae.clear_cache()
        memory = list(vae._feat_map)  # a copy of its own, so that two streams do not meet

        @torch.autocast(self.mean.device.type, enabled=False)  # the VAE is published in float32
        def decode(latents):
            z = latents.float().transpose(1, 2).to(self.mean.device) * self.std + self.mean
            z = vae.post_quant_conv(z)
            frames = [vae.decoder(frame, feat_cache=memory, feat_idx=[0], first_chunk=next(first))
                      for frame in z.split(1, 2)]  # as inside AutoencoderKLWan, but without an end
            return torch.cat(frames, 2).clamp(-1, 1).transpose(1, 2)

        return decode


# ---------------------------------------------------------------- the text encoder

def find_text_encoder(path):
    """(file or folder of the weights, config dict or None, folder of the tokenizer) in what `path`
    names: the encoder with the tokenizer's files beside it, a folder of diffusers' or official
    layout. UsageError if a part is missing."""
    path = Path(path)
    require(path.exists(), f"{path} does not exist: --text-encoder takes Wan's UMT5 encoder")
    root = path if path.is_dir() else path.parent
    if path.is_dir():
        if (path / "text_encoder").is_dir():
            path = path / "text_encoder"
        path = one_of(path, "*t5*", "text encoder") or path
    folder = path if path.is_dir() else path.parent
    config, settings = folder / "config.json", None
    if path.is_dir():
        require(config.is_file(), f"{path} holds no text encoder: name the folder text_encoder of "
                "a -Diffusers download, or models_t5_umt5-xxl-enc-bf16.pth of the official one")
        settings = settings_in(config)
        kind = settings.get("model_type")
        require(kind == "umt5", f"{path} holds {kind or settings.get('_class_name')}, and Wan's "
                "text encoder is UMT5: name the folder text_encoder of a -Diffusers download")
    places = (folder, root, root / "tokenizer", folder.parent / "tokenizer",
              root / "google" / "umt5-xxl")
    files = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
    tokenizer = next((p for p in places if any((p / name).is_file() for name in files)), None)
    require(tokenizer, f"{path} has no tokenizer: put the folder tokenizer of the same download "
            "beside it (or google/umt5-xxl, of the official one)")
    return path, settings, tokenizer


def encoder_settings(tensors):
    """UMT5Config's settings for an official encoder, which has no config.json."""
    def size(name, axis):
        return shape_of(tensors[name])[axis]

    attention, dense = ("encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1."
                        "DenseReluDense")
    heads = size(f"{attention}.relative_attention_bias.weight", 1)
    blocks = {int(name.split(".")[2]) for name in tensors if name.startswith("encoder.block.")}
    return dict(vocab_size=size("shared.weight", 0), d_model=size("shared.weight", 1),
                d_kv=size(f"{attention}.q.weight", 0) // heads, num_heads=heads,
                d_ff=size(f"{dense}.wi_0.weight", 0), num_layers=max(blocks) + 1,
                relative_attention_num_buckets=size(f"{attention}.relative_attention_bias.weight",
                                                    0))


def encoder_tensors(path):
    """(tensors under transformers' names, source in words) of a text encoder. The decoder of a
    whole UMT5 is left out, and so are copies of the embedding."""
    tensors, source, _ = open_tensors(path, companions=True)
    if "token_embedding.weight" in tensors:
        tensors = {transformers_name(name): weight for name, weight in tensors.items()}
    require(not any("scale_weight" in name or "scaled_fp8" in name for name in tensors),
            f"{path} is scaled fp8, each weight with a factor of its own: take the bfloat16 file")
    embedding = tensors.pop("encoder.embed_tokens.weight", None)
    if embedding is not None:
        tensors.setdefault("shared.weight", embedding)
    left_out = ("decoder.", "lm_head.", "spiece_model")
    tensors = {name: w for name, w in tensors.items() if not name.startswith(left_out)}
    required = ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight",
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    require(all(name in tensors for name in required), f"{path} holds no UMT5 encoder: its names "
            f"are {', '.join(sorted(tensors)[:3])} ...; name the folder text_encoder of a "
            "-Diffusers download, or models_t5_umt5-xxl-enc-bf16.pth of the official one")
    return tensors, source


class CaptionEncoder:
    """Wan's text encoder (UMT5): captions to embeddings (l, d), one per token, without padding.

    path: see find_text_encoder(). Weights stay as stored; on a GPU float32 becomes bfloat16, in
    which Wan runs it."""

    def __init__(self, path, length=512, device="cpu"):
        where, settings, tokenizer = find_text_encoder(path)
        with loading(where):
            from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel
            tensors, source = encoder_tensors(where)
            print(f"text encoder: {Weights(tensors, where, source).note()}")
            config = UMT5Config(**(settings or encoder_settings(tensors)))
            with torch.device("meta"):
                model = UMT5EncoderModel(config)
            small = any(dtype_of(weight).startswith("float8") for weight in tensors.values())
            half = device == "cuda" or small  # no CPU computes in float8
            model = fill(model, tensors, where, torch.bfloat16 if half else None)
        with loading(tokenizer, "download the tokenizer again"):
            self.tokens = AutoTokenizer.from_pretrained(tokenizer)
        known, words = len(self.tokens), config.vocab_size
        require(0.99 * words < known <= words, f"{tokenizer} knows {known:,} tokens and {where} "
                f"{words:,}: it is another text encoder's, use google/umt5-xxl")
        self.model = model.to(device)
        self.length, self.device, self.warned = length, device, False

    def encode(self, caption):
        """str -> (l, d), l at most `length`. Warns once when a caption is truncated."""
        tokens = self.tokens(caption, max_length=self.length, truncation=True, return_tensors="pt")
        whole = 0 if self.warned else len(self.tokens(caption)["input_ids"])
        if whole > self.length:
            self.warned = True
            print(f'"{caption[:80]}": only the first {self.length} of {whole} tokens are used',
                  file=sys.stderr)
        if not tokens["input_ids"].numel():  # no caption, and a tokenizer that adds no end token
            return torch.zeros(1, self.model.config.d_model)
        inputs = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return self.model(**inputs).last_hidden_state[0].float()
