"""The encoder: a BERT over packed token sequences, with a masked-token objective.

Sequences of different lengths lie end to end in one row of token ids; `offsets` says where each begins. No layer ever
sees padding, and the prediction head, which at a vocabulary of 25,000 genes would cost more than the encoder, runs at
masked positions alone. What a step must know of its batch (lengths, masked positions) is worked out on the CPU and sent
with it, so that a GPU is never waited for. Nothing here knows about single cells.
"""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datawall.models.training import send

MASK = 1  # id of the mask token; 0 stays free, for padding elsewhere
N_SPECIAL = 2
SHARE = 0.15  # of tokens that are to be predicted
LOGITS_AT_ONCE = {"cpu": 2**22, "cuda": 2**27}  # of the prediction head, whose output is never whole in memory
COMPILED = os.environ.get("DATAWALL_COMPILE", "1") == "1"  # whether layers are compiled on a GPU

# In shapes: B sequences of T tokens in all, the longest of L; C channels in H heads of D; V token ids.
# From queries, keys, values (T, H, D), offsets of queries' sequences and of keys' (B + 1,) int32, and the longest of
# either to (T, H, D): the signature of `torch.nn.attention.varlen.varlen_attn`.
type Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoder. The defaults are those of Geneformer as pretrained by DenAdel et al. 2026."""

    vocab_size: int  # number of token ids, special tokens included
    max_length: int = 2048  # longest sequence: learned positions exist for this many tokens
    n_layers: int = 6
    n_heads: int = 4
    n_embd: int = 256  # width of a token's vector, a multiple of n_heads
    n_inner: int = 512  # width of the feed-forward layer
    dropout: float = 0.02  # on embeddings, attention weights and the two outputs of a layer
    init_std: float = 0.02  # standard deviation of the normal initial weights
    layer_norm_eps: float = 1e-12


class Layout:
    """Where the sequences of a packed batch lie; none may be empty, as attention over no keys is undefined.

    `offsets`, (B + 1,) int64 on the CPU, are the first token of each sequence and the total at the end; `where` is the
    device of the batch.
    """

    def __init__(self, offsets: Tensor, where: torch.device | str = "cpu") -> None:
        lengths = offsets.diff()
        if (lengths < 1).any():
            raise ValueError("a packed sequence is empty; drop cells without any token first.")
        self.longest = int(lengths.max())
        sequence = torch.repeat_interleave(lengths)  # (T,) which sequence a token belongs to
        position = torch.arange(len(sequence)) - offsets[sequence]  # (T,)
        self.offsets = send(offsets.to(torch.int32), where)
        self.sequence, self.position = send(sequence, where), send(position, where)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of the tokens of each sequence: (T, C) to (B, C)."""
        lengths = self.offsets.diff()
        return x.new_zeros(len(lengths), x.shape[1]).index_add(0, self.sequence, x) / lengths[:, None]


class Attention(nn.Module):
    """Multi-head self-attention within each packed sequence (Vaswani et al. 2017, post-norm as in BERT).

    Dropout takes a token from a head's view, for all queries of the sequence alike, where BERT draws anew for each. A
    weight is dropped as often, and attention stays in the fast kernels, none of which knows dropout on a CPU.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, layout: Layout, attend: Attend) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3 * self.n_heads, -1).chunk(3, dim=1)  # (T, 3 C) to thrice (T, H, D)
        if self.training and self.dropout:
            kept = F.dropout(x.new_ones(len(x), self.n_heads, 1), self.dropout)  # bfloat16 would round it
            v = (v * kept).to(v.dtype)
        y = attend(q, k, v, layout.offsets, layout.offsets, layout.longest, layout.longest)
        return y.reshape(x.shape)  # (T, H, D) to (T, C)


class Layer(nn.Module):
    """One encoder layer: attention, then a feed-forward network, each added to its input and normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.widen = nn.Linear(config.n_embd, config.n_inner)
        self.narrow = nn.Linear(config.n_inner, config.n_embd)
        self.output_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layout: Layout, attend: Attend) -> Tensor:
        finish = _compiled(Layer.finish) if COMPILED and x.is_cuda else Layer.finish
        return finish(self, x, self.attention(x, layout, attend))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """All that follows attention: each token on its own, so that compiled code fits batches of any length."""
        x = self.attention_norm(x + self.dropout(self.attention.out(attended)))
        return self.output_norm(x + self.dropout(self.narrow(F.relu(self.widen(x)))))


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.config.recompile_limit = 64  # every width takes three graphs; beyond 8, layers would run uncompiled
    return torch.compile(function, dynamic=True)


def attention(where: torch.device, n_channels: int) -> Attend:
    """What attends on a device, in heads of so many channels: one kernel for packed sequences where there is one."""
    if where.type == "cpu":
        return attend_in_turn
    half = where.type == "cuda" and torch.is_autocast_enabled("cuda") and n_channels % 8 == 0 and n_channels <= 256
    if half and torch.cuda.get_device_capability(where) >= (8, 0):
        return attend_packed
    return attend_padded


def attend_packed(*packed: Any) -> Tensor:
    """Attention by FlashAttention: `varlen_attn` would take cuDNN, which builds a graph for each number of tokens."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.varlen import varlen_attn

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return varlen_attn(*packed)


def attend_in_turn(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, _: Tensor, longest: int, __: int) -> Tensor:
    """Attention, one sequence after the other, or in one call if all are of one length; for a CPU."""
    n_sequences = len(offsets) - 1
    if n_sequences * longest == len(q):
        q, k, v = (x.view(n_sequences, longest, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)  # (T, H, D)
    sizes = offsets.diff().tolist()
    sequences = zip(*(x.transpose(0, 1).split(sizes, dim=1) for x in (q, k, v)), strict=True)  # each thrice (H, L, D)
    y = [F.scaled_dot_product_attention(q[None], k[None], v[None])[0] for q, k, v in sequences]  # each (H, L, D)
    return torch.cat(y, dim=1).transpose(0, 1)  # (H, T, D) to (T, H, D)


def attend_padded(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, _: Tensor, longest: int, __: int) -> Tensor:
    """Attention, all sequences at once, padded to the longest; for a GPU in single precision, or an old one."""
    token = torch.arange(len(q), dtype=offsets.dtype, device=q.device)  # (T,)
    sequence = torch.searchsorted(offsets[1:], token, right=True)
    place = sequence, (token - offsets.index_select(0, sequence)).long()
    keys = torch.arange(longest, device=q.device) < offsets.diff()[:, None]  # (B, L) whether there is a token
    shape = len(offsets) - 1, longest, *q.shape[1:]
    q, k, v = (x.new_zeros(shape).index_put(place, x).transpose(1, 2) for x in (q, k, v))  # (B, H, L, D)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None])
    return y.transpose(1, 2)[place]  # (B, L, H, D) to (T, H, D)


class Encoder(nn.Module):
    """BERT for masked tokens (Devlin et al. 2019), with tied input and output embeddings.

    Gives the loss of `transformers.BertForMaskedLM` with the same weights. BERT's token-type embedding is left out:
    with one type it is a constant that the position embedding absorbs.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.max_length, config.n_embd)
        self.norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.head = nn.Linear(config.n_embd, config.n_embd)
        self.head_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def hidden(self, ids: Tensor, layout: Layout, n_layers: int | None = None) -> Tensor:
        """Token vectors (T, C) after the first `n_layers` layers; after all of them by default."""
        x = self.dropout(self.norm(self.tokens(ids) + self.positions(layout.position)))
        attend = attention(x.device, self.config.n_embd // self.config.n_heads)
        for layer in self.layers[:n_layers]:
            x = layer(x, layout, attend)
        return x

    def forward(self, ids: Tensor, layout: Layout, chosen: Tensor, originals: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, of the tokens at some positions.

        `ids`, (T,), are the token ids of the packed sequences, masked ones replaced; `chosen` and `originals`, (N,),
        the positions to predict and the token ids that belong there, as of `mask_tokens`. All are int64.
        """
        hidden = self.hidden(ids, layout).index_select(0, chosen)  # (T, C) to (N, C)
        hidden = self.head_norm(F.relu(self.head(hidden)))
        learning = torch.is_grad_enabled()
        return _CrossEntropy.apply(hidden, self.tokens.weight, self.head_bias, originals, learning)

    @torch.no_grad()
    def embed(self, ids: Tensor, layout: Layout) -> Tensor:
        """Mean over tokens of the second-to-last layer's vectors, (B, C), as Geneformer's embedding is taken."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            hidden = self.hidden(ids, layout, n_layers=self.config.n_layers - 1)
        return layout.mean(hidden.float())


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a linear layer's output, some rows at a time; gradients are taken on the way forward."""

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, learning: bool) -> Tensor:
        d_inputs, d_weight, d_bias = torch.empty_like(inputs), torch.zeros_like(weight), torch.zeros_like(bias)
        total = torch.zeros((), device=inputs.device)
        n_rows = max(1, LOGITS_AT_ONCE.get(inputs.device.type, 2**27) // len(weight))
        for first in range(0, len(inputs), n_rows):
            rows = slice(first, first + n_rows)
            logits, target = F.linear(inputs[rows], weight, bias).float(), targets[rows, None]  # (n, V) and (n, 1)
            log_sum = logits.logsumexp(1, keepdim=True)  # (n, 1)
            total += (log_sum - logits.gather(1, target)).sum()
            if learning:  # by logits, the gradient is softmax less one at the target
                gradient = logits.sub_(log_sum).exp_()
                gradient.scatter_add_(1, target, -torch.ones_like(log_sum))
                d_inputs[rows] = gradient @ weight
                d_weight += gradient.T @ inputs[rows]
                d_bias += gradient.sum(0)
        ctx.gradients, ctx.n_rows = (d_inputs, d_weight, d_bias), len(inputs)
        return total / len(inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts, ctx.gradients = ctx.gradients, None  # scaled in place, so of use once
        return *(part.mul_(gradient / ctx.n_rows) for part in parts), None, None


def mask_tokens(ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose tokens to predict and hide them (Devlin et al. 2019, section 3.1).

    Each token is chosen with probability `SHARE`; a chosen one becomes the mask token in 80 % of cases, a random
    token, never a special one, in 10 % and stays itself in 10 %. At least one token is chosen. Random by torch's
    global generator. `ids`, (T,) int64, are on the CPU, where nobody waits. Gives the masked ids, the chosen positions
    and the token ids that were there, (N,) int64 both.
    """
    draw = torch.rand(ids.shape)
    draw[draw.argmin()] = 0.0
    chosen = draw < SHARE
    # The same uniform number, rescaled within the chosen share, decides what a chosen token becomes.
    fate = draw / SHARE
    random_ids = torch.randint(N_SPECIAL, vocab_size, ids.shape)
    masked = torch.where(chosen & (fate < 0.8), MASK, ids)
    masked = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), random_ids, masked)
    positions = chosen.nonzero().view(-1)
    return masked, positions, ids[positions]


def chance_loss(vocab_size: int) -> float:
    """Cross-entropy, in nats, of guessing uniformly among the genes: where an untrained model begins."""
    return math.log(vocab_size - N_SPECIAL)
