"""LoRA and textual inversion of other programs, loaded into a pipeline beside its customizations."""

from __future__ import annotations

from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from torch import nn


class Adapters(TextualInversionLoaderMixin, StableDiffusionLoraLoaderMixin):
    """Mixin of `ESCDPipeline`: diffusers' loaders, which leave the shared tensors of the backbone alone."""

    def load_textual_inversion(self, *args: object, **kwargs: object) -> None:
        """Load words in diffusers' form beside the customizations, as `StableDiffusionPipeline` does.

        Raises ValueError for a word that is a loaded customization's pseudo-word.
        """
        before = set(self.tokenizer.get_added_vocab())
        _unshare(self.text_encoder.get_input_embeddings())
        super().load_textual_inversion(*args, **kwargs)
        new = set(self.tokenizer.get_added_vocab()) - before
        if clash := sorted(new & set(self.customizations)):
            self.unload_textual_inversion(sorted(new))
            raise ValueError(f"{clash[0]!r} is a customization's pseudo-word: give another token=")

    def fuse_lora(self, *args: object, **kwargs: object) -> None:
        """Add loaded LoRAs to the weights, as `StableDiffusionPipeline` does; these are no longer shared."""
        for module in (self.unet, self.text_encoder):
            _unshare(module)
        super().fuse_lora(*args, **kwargs)


def _unshare(module: nn.Module) -> None:
    """Give a module tensors of its own, for what writes into them."""
    for p in module.parameters():
        p.data = p.data.clone()
