"""The encoder: a BERT over packed token sequences, with a masked-token objective.

Sequences of different lengths lie end to end in one row of token ids; `offsets` says where each begins.
No layer but attention ever sees padding, on a CPU not even that, and the prediction head runs at masked positions
alone: at 15 % masking and a vocabulary of 25,000 genes the head would otherwise cost more than the encoder.

Nothing here knows about single cells; only torch is imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD, MASK = 0, 1
N_SPECIAL = 2
IGNORED = -100


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


class Attention(nn.Module):
    """Multi-head self-attention within each packed sequence (Vaswani et al. 2017, post-norm as in BERT).

    Dropout takes a token from a head's view: the attention weights on it become zero for all queries of the sequence
    alike, where BERT draws anew for each query. Each weight is dropped as often, and attention stays in the fast
    kernels, none of which knows dropout on a CPU.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        n_tokens, width = x.shape
        q, k, v = self.qkv(x).view(n_tokens, 3 * self.n_heads, -1).chunk(3, dim=1)  # each (T, H, D)
        if self.training and self.dropout:
            v = v * F.dropout(v.new_ones(n_tokens, self.n_heads, 1), self.dropout)
        return self.out(layout.attend(q, k, v).reshape(n_tokens, width))


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

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, layout)))
        return self.output_norm(x + self.dropout(self.narrow(F.relu(self.widen(x)))))


class Layout:
    """Where the sequences of a packed batch lie, and how to pad them for attention and pack them again.

    Parameters
    ----------
    offsets
        (B + 1,) int64, first token of each sequence and the total at the end.

    Raises
    ------
    ValueError
        If a sequence is empty: attention over no keys is undefined.
    """

    def __init__(self, offsets: Tensor) -> None:
        lengths = offsets.diff()
        if (lengths < 1).any():
            raise ValueError("a packed sequence is empty; drop cells without any token first.")
        self.n_sequences = len(lengths)
        self.sequence = torch.repeat_interleave(
            torch.arange(self.n_sequences, device=offsets.device), lengths
        )  # (T,) which sequence a token belongs to
        self.position = torch.arange(len(self.sequence), device=offsets.device) - offsets[self.sequence]  # (T,)
        self.longest = int(lengths.max())
        self.lengths = lengths
        self.sizes = lengths.tolist()
        self.padded = self.longest * self.n_sequences != len(self.sequence)
        keys = torch.arange(self.longest, device=offsets.device) < lengths[:, None]  # (B, L)
        self.key_mask = keys[:, None, None, :]  # (B, 1, 1, L)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of each sequence's tokens to one another: queries, keys, values (T, H, D) to (T, H, D)."""
        if not self.padded:
            shape = self.n_sequences, self.longest, *q.shape[1:]
            q, k, v = (each.view(shape).transpose(1, 2) for each in (q, k, v))  # (B, H, L, D)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
        # One call keeps a GPU busy; a CPU gains more from not working on padding.
        return self.attend_each(q, k, v) if q.device.type == "cpu" else self.attend_padded(q, k, v)

    def attend_each(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend`, one sequence after the other."""
        parts = zip(*(each.transpose(0, 1).split(self.sizes, dim=1) for each in (q, k, v)), strict=True)
        y = [F.scaled_dot_product_attention(*(each[None] for each in part))[0] for part in parts]  # (H, L, D)
        return torch.cat(y, dim=1).transpose(0, 1)

    def attend_padded(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend`, all sequences at once."""
        q, k, v = (self.pad(each).transpose(1, 2) for each in (q, k, v))  # (B, H, L, D)
        return self.pack(F.scaled_dot_product_attention(q, k, v, attn_mask=self.key_mask).transpose(1, 2))

    def pad(self, x: Tensor) -> Tensor:
        """(T, ...) to (B, L, ...), zeros after each sequence's end."""
        shape = (self.n_sequences, self.longest, *x.shape[1:])
        return x.new_zeros(shape).index_put((self.sequence, self.position), x)

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) back to (T, ...)."""
        return x[self.sequence, self.position]

    def mean(self, x: Tensor) -> Tensor:
        """Mean of the tokens of each sequence: (T, C) to (B, C)."""
        total = x.new_zeros(self.n_sequences, x.shape[1]).index_add(0, self.sequence, x)
        return total / self.lengths[:, None]


class Encoder(nn.Module):
    """BERT for masked tokens (Devlin et al. 2019), with tied input and output embeddings.

    Gives the same logits as `transformers.BertForMaskedLM` with the same weights (a test proves it). BERT's
    token-type embedding is left out: with one type it is a constant that the position embedding absorbs.
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
        for layer in self.layers[:n_layers]:
            x = layer(x, layout)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token id, (N, V), for N token vectors (N, C)."""
        return F.linear(self.head_norm(F.relu(self.head(hidden))), self.tokens.weight, self.head_bias)

    def forward(self, ids: Tensor, offsets: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, at the positions where `targets` is not `IGNORED`.

        Parameters
        ----------
        ids
            (T,) int64 token ids of the packed sequences, masked ones replaced.
        offsets
            (B + 1,) int64 beginnings of the sequences.
        targets
            (T,) int64 original ids where the loss is taken, `IGNORED` elsewhere.
        """
        chosen = targets != IGNORED
        hidden = self.hidden(ids, Layout(offsets))
        return F.cross_entropy(self.logits(hidden[chosen]).float(), targets[chosen])

    @torch.no_grad()
    def embed(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Mean over tokens of the second-to-last layer's vectors, (B, C), as Geneformer's embedding is taken."""
        layout = Layout(offsets)
        return layout.mean(self.hidden(ids, layout, n_layers=self.config.n_layers - 1).float())


def mask_tokens(
    ids: Tensor, vocab_size: int, generator: torch.Generator | None = None, share: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Choose tokens to predict and hide them (Devlin et al. 2019, section 3.1).

    Each token is chosen with probability `share`; a chosen one becomes the mask token in 80 % of cases, a random
    token in 10 % and stays itself in 10 %. At least one token is chosen.

    Parameters
    ----------
    ids
        (T,) int64 token ids without special tokens.
    vocab_size
        Number of token ids, special tokens included; random tokens are never special.
    generator
        Source of randomness, on the device of `ids`; torch's global one by default.
    share
        Probability that a token is chosen, in (0, 1].

    Returns
    -------
    masked ids and targets, both (T,) int64; targets are `IGNORED` where nothing is to be predicted.
    """
    draw = torch.rand(ids.shape, generator=generator, device=ids.device)
    draw[draw.argmin()] = 0.0
    chosen = draw < share
    # The same uniform number, rescaled within the chosen share, decides what a chosen token becomes.
    fate = draw / share
    random_ids = torch.randint(N_SPECIAL, vocab_size, ids.shape, generator=generator, device=ids.device)
    masked = torch.where(chosen & (fate < 0.8), torch.full_like(ids, MASK), ids)
    masked = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), random_ids, masked)
    return masked, torch.where(chosen, ids, torch.full_like(ids, IGNORED))


def chance_loss(vocab_size: int) -> float:
    """Cross-entropy, in nats, of guessing uniformly among the genes: where an untrained model begins."""
    return math.log(vocab_size - N_SPECIAL)
