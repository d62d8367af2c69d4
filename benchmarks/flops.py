"""Floating-point operations of a ViT with prompts, counted on paper; a multiply-add is two.

"useful" leaves out what need not be done twice: the first block's QKV of image tokens is shared by all prompts, only
the class token leaves the last block, and deep prompts are keys and values alone.
"""

from __future__ import annotations

from dataclasses import dataclass

BACKWARD = 47.6 / 44.2
"""The backward pass to the prompts, in forward passes: no gradients of weights, so every product with a weight once,
and attention's two products twice."""


@dataclass(frozen=True)
class Network:
    """A plain ViT: d, blocks, image tokens with the class token, p, and whether every block has its own prompt."""

    width: int
    depth: int
    image_tokens: int
    prompt_tokens: int
    deep: bool = False

    def forward(self, *, useful: bool) -> float:
        """One image under one prompt."""
        d, p = self.width, self.prompt_tokens
        linear = 2 * 12 * d * d  # QKV, projection and MLP, per token and block
        total = p + self.image_tokens
        if not useful:
            return self.depth * (linear * total + 4 * total * total * d)
        rows = self.image_tokens if self.deep else total  # tokens that go through the linear layers
        middle = (self.depth - 2) * (linear * rows + 4 * rows * total * d)
        first = linear * rows * 0.75 + 4 * rows * total * d  # QKV, a quarter of the linear work, is shared
        last = linear / 6 * rows + linear * 5 / 6 + 4 * total * d  # K and V on all tokens, the rest on one
        return middle + first + last

    def backward(self, *, useful: bool) -> float:
        """Of one image and one prompt, to the prompt."""
        return BACKWARD * self.forward(useful=useful)

    def run(self, images: int, prompts: int, gradient_images: int = 256, *, useful: bool = True) -> float:
        """The network's part of `fast_ensemble`: all images forward, the gradient sample forward and backward again."""
        sample = min(gradient_images, images) * (self.forward(useful=useful) + self.backward(useful=useful))
        return prompts * (images * self.forward(useful=useful) + sample)


VIT_B16 = Network(width=768, depth=12, image_tokens=197, prompt_tokens=50)
