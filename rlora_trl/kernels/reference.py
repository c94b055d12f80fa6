"""The equations of R-LoRA (arXiv 2502.15455) as a plain loop over heads: slow, wide, and the truth for the tests."""

import torch


def multihead_delta_reference(
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    router: torch.Tensor | None = None,
    anchor_A: torch.Tensor | None = None,
    anchor_B: torch.Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    head_masks: torch.Tensor | None = None,
    input_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    What a multi-head adapter adds to the output of its layer, head by head (paper, section 3 and equation 4).

    Args:
        x (`torch.Tensor` of shape `[T, d_in]`): Tokens.
        A (`torch.Tensor` of shape `[r, d_in]`): Shared down-projection.
        B (`torch.Tensor` of shape `[N, d_out, r]`): Head matrices.
        router (`torch.Tensor` of shape `[N, d_in]`, *optional*): Router; without it every head weighs `1 / N`.
        anchor_A (`torch.Tensor` of shape `[r, d_in]`, *optional*): Initial value of `A`.
        anchor_B (`torch.Tensor` of shape `[d_out, r]`, *optional*): Mean over heads of the initial `B`.
        scaling (`float`): Factor in front of the sum.
        dropout (`float`): Probability that an element is dropped.
        head_masks (`torch.Tensor` of shape `[T, N, r]`, *optional*): Elements of `A x` that each head keeps.
        input_mask (`torch.Tensor` of shape `[T, d_in]`, *optional*): Elements of `x` that the path through `A` keeps.

    Returns:
        `torch.Tensor` of shape `[T, d_out]`.
    """
    num_heads = B.shape[0]
    keep = 1.0 - dropout
    h = (x if input_mask is None else x * input_mask / keep) @ A.T  # [T, r]
    if router is None:
        weights = x.new_full((x.shape[0], num_heads), 1.0 / num_heads)
    else:
        weights = torch.softmax(x @ router.T, dim=-1)  # [T, N]
    y = x.new_zeros(x.shape[0], B.shape[1])
    for i in range(num_heads):
        h_i = h if head_masks is None else h * head_masks[:, i] / keep  # [T, r]
        y = y + weights[:, i : i + 1] * (h_i @ B[i].T)  # [T, d_out]
    if anchor_A is not None and anchor_B is not None:
        y = y - (x @ anchor_A.T) @ anchor_B.T
    return scaling * y
