"""The equations of R-LoRA (arXiv 2502.15455) and of the balance losses, written out: the truth for tests."""

import torch


BALANCE_LOSSES = ("none", "switch", "importance", "mutual_information", "z")


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
    logits: torch.Tensor | None = None,
    top_k: int = 0,
) -> torch.Tensor:
    """
    The delta that a multi-head adapter adds to its layer, head by head (paper, section 3 and equation 4).

    Args:
        x (`torch.Tensor` of shape `[T, d_in]`): Tokens.
        A (`torch.Tensor` of shape `[r, d_in]` or `[N, r, d_in]`): Down-projection, shared or one for each head.
        B (`torch.Tensor` of shape `[N, d_out, r]`): Head matrices.
        router (`torch.Tensor` of shape `[N, d_in]`, *optional*): Router; without it every head weighs `1 / N`.
        anchor_A (`torch.Tensor` like `A`, *optional*): Initial value of `A`.
        anchor_B (`torch.Tensor` of shape `[d_out, r]` or, with an A for each head, `[N, d_out, r]`, *optional*): Mean
            over heads of the initial `B`, or the initial `B`.
        scaling (`float`, *optional*, defaults to `1.0`): Factor of the delta.
        dropout (`float`, *optional*, defaults to `0.0`): Probability that an element is dropped.
        head_masks (`torch.Tensor` of shape `[T, N, r]`, *optional*): Elements of `A x` that each head keeps.
        input_mask (`torch.Tensor` of shape `[T, d_in]`, *optional*): Elements of `x` that the path through `A` keeps.
        logits (`torch.Tensor` of shape `[T, N]`, *optional*): Logits that replace the router's.
        top_k (`int`, *optional*, defaults to `0`): Heads kept for each token, those with the largest logits; 0 keeps
            all.

    Returns:
        `torch.Tensor` of shape `[T, d_out]`.
    """
    num_heads = B.shape[0]
    keep = 1.0 - dropout
    masked_x = x if input_mask is None else x * input_mask / keep
    heads_A = [A] * num_heads if A.ndim == 2 else list(A)

    # Head weights.
    if router is not None:
        logits = x @ router.T
    if logits is None:
        logits = x.new_zeros(x.shape[0], num_heads)
    elif 0 < top_k < num_heads:
        smallest_kept = logits.sort(dim=-1, descending=True).values[:, top_k - 1 : top_k]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    weights = torch.softmax(logits, dim=-1)  # [T, N]

    # The weighted sum over heads.
    y = x.new_zeros(x.shape[0], B.shape[1])
    for i in range(num_heads):
        h_i = masked_x @ heads_A[i].T  # [T, r]
        if head_masks is not None:
            h_i = h_i * head_masks[:, i] / keep
        y = y + weights[:, i : i + 1] * (h_i @ B[i].T)  # [T, d_out]

    # The offset that the anchor takes off.
    if anchor_A is not None and anchor_B is not None:
        if A.ndim == 2:
            y = y - (x @ anchor_A.T) @ anchor_B.T
        else:
            for i in range(num_heads):
                y = y - (x @ anchor_A[i].T) @ anchor_B[i].T / num_heads
    return scaling * y


def balance_loss(logits: torch.Tensor, kind: str, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    The balance loss of one layer, for autograd; in float32 or wider. The formulas are in `balance.py`.

    Args:
        logits (`torch.Tensor` of shape `[T, N]`): The router's logits.
        kind (`str`): One of `BALANCE_LOSSES`; "none" gives zero.
        token_mask (`torch.Tensor` of shape `[T]`, *optional*): Non-zero for the tokens that count; by default all do.

    Returns:
        `torch.Tensor`: A scalar.

    Raises:
        ValueError: If `kind` is unknown.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if token_mask is not None:
        logits = logits[token_mask.bool()]
    num_heads = logits.shape[-1]
    p = logits.softmax(-1)  # [T, N]
    mean = p.mean(0)  # [N]

    if kind == "none":
        return logits.new_zeros(())
    if kind == "switch":
        top = (p == p.amax(-1, keepdim=True)).to(p.dtype)
        return num_heads * ((top / top.sum(-1, keepdim=True)).mean(0) * mean).sum()
    if kind == "importance":
        return mean.var(correction=0) / mean.mean() ** 2
    if kind == "mutual_information":
        return (mean * mean.log()).sum() - (p * logits.log_softmax(-1)).sum(-1).mean()
    if kind == "z":
        return (logits.logsumexp(-1) ** 2).mean()
    raise ValueError(f"`kind` must be one of {', '.join(BALANCE_LOSSES)}, got {kind!r}. Use 'switch', for example.")
