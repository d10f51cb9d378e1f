"""Text and image towers without wasted tokens: the host's own features and gradients, to rounding, for less work.

    packed      causal prompts end with their pooled token and lie end to end: no padding is computed
    pooled      the last block computes queries, output projection and MLP for the pooled token alone
    frozen      what lies below the lowest adapter is computed once (text) or leaves nothing behind (images)
    prefix      share_prefix=True: the first tokens that all prompts have in common are computed once
    microbatch  a loss of images a few at a time: each part is differentiated before the next one begins
    cast once   under autocast frozen weights are cast once (frozen_in), not at every step

One seed is drawn per forward pass and handed to every layer; with the identity of each row it keys the dropout masks, so
that packing, order and sharding do not change them.
"""

from .image import ImageEncoder, encode_image
from .microbatch import microbatched
from .precision import cast, cast_anew, frozen_in
from .text import TextEncoder, common_prefix, encode_text
from .towers import Plan, plan

__all__ = [
    "ImageEncoder",
    "Plan",
    "TextEncoder",
    "cast",
    "cast_anew",
    "common_prefix",
    "encode_image",
    "encode_text",
    "frozen_in",
    "microbatched",
    "plan",
]
