"""Wan 2.1's published companions: its video VAE and its text encoder.

At toy scale PatchCodec and WordEncoder (data.py) stand in with the same interfaces. Needs
requirements-wan.txt: the models are diffusers' AutoencoderKLWan and transformers' UMT5EncoderModel.
"""
import contextlib
import itertools
from pathlib import Path

import torch
from safetensors import SafetensorError

from utils.errors import UsageError, first_line, require


@contextlib.contextmanager
def loading(path):
    """One sentence for what can go wrong while a published model is loaded from a folder."""
    require(Path(path).is_dir(), f"{path} is not a folder: name the one with the downloaded model")
    try:
        yield
    except ImportError as error:
        raise UsageError(f"{error}: pip install -r requirements-wan.txt") from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"the model in {path} cannot be loaded ({first_line(error)}): download it "
                         "again") from None


class WanCodec:
    """Wan's video VAE behind the codec interface: 1 + 4 k frames <-> 1 + k latent frames.

    path: a folder with the VAE's config.json and weights."""
    ratio = 4  # frames per latent frame, after the first

    def __init__(self, path, device="cpu"):
        with loading(path):
            from diffusers import AutoencoderKLWan
            vae = AutoencoderKLWan.from_pretrained(path)
        self.vae = vae.eval().requires_grad_(False).to(device)
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


class CaptionEncoder:
    """Wan's text encoder (UMT5): captions to embeddings (l, d), one per token, without padding."""

    def __init__(self, path, length=512, device="cpu"):
        with loading(path):
            from transformers import AutoTokenizer, UMT5EncoderModel
            self.tokens = AutoTokenizer.from_pretrained(path)
            model = UMT5EncoderModel.from_pretrained(path)
        self.model = model.eval().requires_grad_(False).to(device)
        self.length, self.device = length, device

    def encode(self, caption):
        """str -> (l, d), l at most `length`"""
        tokens = self.tokens(caption, max_length=self.length, truncation=True, return_tensors="pt")
        if not tokens["input_ids"].numel():  # no caption, and a tokenizer that adds no end token
            return torch.zeros(1, self.model.config.d_model)
        inputs = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return self.model(**inputs).last_hidden_state[0].float()
