"""Operations that QLoRA needs for a token, the same for everyone who is compared; recomputing and padding are no work.

Multiply and add are two. Kaplan et al. 2020, arXiv 2001.08361, section 2.1: 2 a weight forward, 2 for the gradient of
the input, 2 for that of the weight. A frozen weight has no gradient of its own (QLoRA, arXiv 2305.14314): 4 are left.
"""

import numpy as np


def per_token(shape, lengths, adapter_parameters):
    """Floating-point operations of training on one real token of documents of these lengths, in tokens.

    The base has its layers and its head, the embedding is looked up; norms and the like are left out. Of a mixture
    those experts count that a token goes through; `adapter_parameters` are those that it meets.
    """
    frozen = shape.active_parameters + shape.vocabulary * shape.hidden
    return 4 * frozen + 6 * adapter_parameters + attention(shape, lengths) / float(np.sum(lengths))


def attention(shape, lengths):
    """Operations: for each pair of tokens that see each other and unit of width, 4 forward and 8 backward.

    As if no layer had a window: of documents longer than one, too many.
    """
    exact = np.asarray(lengths, dtype=np.float64)
    return 12 * shape.layers * shape.heads * shape.head_width * float((exact * (exact + 1) / 2).sum())
