"""One pretraining step at the original's size against transformers' BertForMaskedLM, same weights and tokens.

Six layers of four heads, 256 wide, a vocabulary of 25,426, dropout 0.02; two cells of 1,300 to 2,048 genes; forward,
backward and fused AdamW in single precision, on this machine's CPU. The peer pads to 2,048, as a batch of the
original's 144 cells is, attends by the kernel it chooses itself, and computes the head at every position.

Floor: six operations for each weight and token in the layers and for each weight and masked token in the head, twelve
for each pair of tokens of a cell, channel and layer in attention, about 90 billion a cell, at the speed of a product
of two 2,048 x 2,048 matrices.
"""

import sys
from pathlib import Path

import torch
from alternate import matrix_speed, report, training_step

from datawall.models.transformer import N_SPECIAL, Encoder, EncoderConfig, Layout, mask_tokens

sys.path.append(str(Path(__file__).parents[1]))
from test_transformer import bert_with_the_weights_of, labels, padded


def at_full_length(packed, fill):
    rows = padded(packed, offsets, fill)
    return torch.nn.functional.pad(rows, (0, config.max_length - rows.shape[1]), value=fill)


torch.manual_seed(0)
config = EncoderConfig(vocab_size=25_426)
lengths = torch.randint(1300, 2049, (2,))
offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
ids = torch.randint(N_SPECIAL, config.vocab_size, (int(offsets[-1]),))
masked, *hidden = mask_tokens(ids, config.vocab_size)

ours = Encoder(config)
peer = bert_with_the_weights_of(ours)
batch = {
    "input_ids": at_full_length(masked, 0),
    "attention_mask": at_full_length(torch.ones_like(ids), 0),
    "labels": at_full_length(labels(ids, *hidden), -100),
}
with torch.no_grad():
    torch.testing.assert_close(
        ours.eval()(masked, Layout(offsets), *hidden), peer.eval()(**batch).loss, atol=1e-4, rtol=0
    )


speed, adam = matrix_speed(), {"lr": 1e-3, "fused": True}
in_layers = sum(weight.numel() for weight in ours.layers.parameters())
in_head = ours.tokens.weight.numel() + ours.head.weight.numel()
pairs = int((lengths**2).sum()) * config.n_embd * config.n_layers
operations = 6 * in_layers * len(ids) + 6 * in_head * len(hidden[0]) + 12 * pairs
print(f"{operations / 1e9:,.0f} billion operations a step; matrix products run at {speed / 1e9:,.0f} billion a second")
report(
    "tokens",
    len(ids),
    training_step(peer.train(), lambda: peer(**batch).loss, **adam),
    training_step(ours.train(), lambda: ours(masked, Layout(offsets), *hidden), **adam),
    floor=operations / speed,
)
