"""One pretraining step at the original's size against transformers' BertForMaskedLM with padding, same tokens.

Cells of 1,300 to 2,048 tokens, a vocabulary of 25,426, on this machine's CPU. Floor: six floating-point operations
a weight and token in the encoder, the same again for the head at 15 % of the tokens, and attention.
"""

from itertools import pairwise

import torch
from alternate import report
from transformers import BertConfig, BertForMaskedLM

from datawall.transformer import IGNORED, N_SPECIAL, Encoder, EncoderConfig, mask_tokens

VOCABULARY, CELLS = 25_426, 2

torch.manual_seed(0)
lengths = torch.randint(1300, 2049, (CELLS,))
offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
ids = torch.randint(N_SPECIAL, VOCABULARY, (int(offsets[-1]),))
masked, targets = mask_tokens(ids, VOCABULARY, torch.Generator().manual_seed(0))

ours = Encoder(EncoderConfig(vocab_size=VOCABULARY))
peer = BertForMaskedLM(
    BertConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
        hidden_act="relu", hidden_dropout_prob=0.02, attention_probs_dropout_prob=0.02, max_position_embeddings=2048,
        layer_norm_eps=1e-12, pad_token_id=0,
    )
)  # fmt: skip
padded = torch.zeros(CELLS, 2048, dtype=torch.long)
labels = torch.full((CELLS, 2048), IGNORED)
attended = torch.zeros(CELLS, 2048, dtype=torch.long)
for i, (first, last) in enumerate(pairwise(offsets)):
    padded[i, : last - first], labels[i, : last - first], attended[i, : last - first] = (
        masked[first:last],
        targets[first:last],
        1,
    )
optimisers = {model: torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (ours, peer)}


def step(model, loss):
    optimisers[model].zero_grad()
    loss.backward()
    optimisers[model].step()
    return float(loss)


begin = ours(masked, offsets, targets), peer(padded, attention_mask=attended, labels=labels).loss
assert abs(begin[0] - begin[1]) < 0.2, begin  # both start at chance, log of the vocabulary
report(
    "tokens",
    len(ids),
    lambda: step(peer, peer(padded, attention_mask=attended, labels=labels).loss),
    lambda: step(ours, ours(masked, offsets, targets)),
)
