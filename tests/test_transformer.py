import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from datawall.transformer import (
    IGNORED,
    MASK,
    N_SPECIAL,
    Attention,
    Encoder,
    EncoderConfig,
    Layout,
    chance_loss,
    mask_tokens,
)

LENGTHS = [5, 12, 1, 9]
SMALL = EncoderConfig(vocab_size=50, max_length=12, n_layers=3, n_heads=4, n_embd=32, n_inner=48, dropout=0.0)


def encoder_with_every_weight_random(seed=0):
    """Initial biases and norms are zeros and ones, which would hide one that is left out or swapped."""
    torch.manual_seed(seed)
    encoder = Encoder(SMALL)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return encoder


def their_names(config):
    """BERT's name of each weight, by ours; its query, key and value lie in one of ours."""
    modules = {
        "tokens": "bert.embeddings.word_embeddings",
        "positions": "bert.embeddings.position_embeddings",
        "norm": "bert.embeddings.LayerNorm",
        "head": "cls.predictions.transform.dense",
        "head_norm": "cls.predictions.transform.LayerNorm",
    }
    qkv = {}
    for i in range(config.n_layers):
        theirs = f"bert.encoder.layer.{i}"
        modules |= {
            f"layers.{i}.attention.out": f"{theirs}.attention.output.dense",
            f"layers.{i}.attention_norm": f"{theirs}.attention.output.LayerNorm",
            f"layers.{i}.widen": f"{theirs}.intermediate.dense",
            f"layers.{i}.narrow": f"{theirs}.output.dense",
            f"layers.{i}.output_norm": f"{theirs}.output.LayerNorm",
        }
        for part in ("weight", "bias"):
            qkv[f"layers.{i}.attention.qkv.{part}"] = [
                f"{theirs}.attention.self.{which}.{part}" for which in ("query", "key", "value")
            ]
    single = {f"{ours}.{part}": [f"{theirs}.{part}"] for ours, theirs in modules.items() for part in ("weight", "bias")}
    return single | qkv | {"head_bias": ["cls.predictions.bias"]}


def bert_with_the_weights_of(encoder, **settings):
    c = encoder.config
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.n_embd,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            intermediate_size=c.n_inner,
            hidden_act="relu",
            hidden_dropout_prob=c.dropout,
            attention_probs_dropout_prob=c.dropout,
            max_position_embeddings=c.max_length,
            layer_norm_eps=1e-12,
            tie_word_embeddings=True,
            **settings,
        )
    )
    names = their_names(c)
    theirs = {}
    for our_name, weight in encoder.state_dict().items():
        theirs |= zip(names[our_name], weight.chunk(len(names[our_name])), strict=True)
    theirs["bert.embeddings.token_type_embeddings.weight"] = torch.zeros(2, c.n_embd)
    theirs["cls.predictions.decoder.bias"] = encoder.head_bias
    theirs["cls.predictions.decoder.weight"] = encoder.tokens.weight
    missing, unexpected = bert.load_state_dict(theirs, strict=False)
    assert not unexpected
    assert all("position_ids" in name or "token_type_ids" in name for name in missing)
    return bert


def packed_batch(lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(N_SPECIAL, SMALL.vocab_size, (sum(lengths),), generator=generator)
    return ids, torch.tensor(np.concatenate([[0], np.cumsum(lengths)]))


def padded(packed, offsets, fill):
    longest = int(offsets.diff().max())
    rows = [
        torch.nn.functional.pad(row, (0, longest - len(row)), value=fill)
        for row in packed.split(offsets.diff().tolist())
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("lengths", [LENGTHS, [7, 7, 7]])
def test_logits_are_those_of_bert(lengths):
    encoder = encoder_with_every_weight_random().eval()
    bert = bert_with_the_weights_of(encoder).eval()
    ids, offsets = packed_batch(lengths)
    real = padded(torch.ones_like(ids), offsets, 0)
    with torch.no_grad():
        ours = encoder.logits(encoder.hidden(ids, Layout(offsets)))
        theirs = bert(input_ids=padded(ids, offsets, 0), attention_mask=real).logits[real.bool()]
    assert theirs.std() > 0.5  # weights large enough for a mistake to show
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [LENGTHS, [7, 7, 7]])
def test_training_loss_and_gradients_are_those_of_bert(lengths):
    encoder = encoder_with_every_weight_random().train()
    bert = bert_with_the_weights_of(encoder).train()
    ids, offsets = packed_batch(lengths)
    masked, targets = mask_tokens(ids, SMALL.vocab_size, torch.Generator().manual_seed(2), share=0.4)
    real = padded(torch.ones_like(ids), offsets, 0)
    ours = encoder(masked, offsets, targets)
    theirs = bert(
        input_ids=padded(masked, offsets, 0), attention_mask=real, labels=padded(targets, offsets, IGNORED)
    ).loss
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    ours.backward()
    theirs.backward()
    names, gradients = their_names(SMALL), {name: weight.grad for name, weight in bert.named_parameters()}
    for name, weight in encoder.named_parameters():
        expected = torch.cat([gradients[their_name] for their_name in names[name]])
        torch.testing.assert_close(weight.grad, expected, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: name + text)


def test_attention_is_the_same_sequence_by_sequence_and_padded():
    layout = Layout(packed_batch()[1])
    torch.manual_seed(0)
    q, k, v = torch.randn(3, sum(LENGTHS), 4, 8)
    torch.testing.assert_close(layout.attend_padded(q, k, v), layout.attend_each(q, k, v), atol=1e-6, rtol=1e-5)


def test_embedding_is_the_mean_of_berts_second_to_last_layer():
    encoder = encoder_with_every_weight_random().eval()
    bert = bert_with_the_weights_of(encoder).eval()
    ids, offsets = packed_batch()
    real = padded(torch.ones_like(ids), offsets, 0)
    with torch.no_grad():
        hidden = bert(input_ids=padded(ids, offsets, 0), attention_mask=real, output_hidden_states=True).hidden_states[
            -2
        ]
    theirs = torch.stack([hidden[i, :n].mean(dim=0) for i, n in enumerate(LENGTHS)])
    ours = encoder.embed(ids, offsets)
    assert ours.dtype == torch.float32
    assert not ours.requires_grad
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_sequence_does_not_see_its_companions():
    encoder = encoder_with_every_weight_random().eval()
    ids, offsets = packed_batch()
    together = encoder.embed(ids, offsets)
    for i, alone in enumerate(ids.split(LENGTHS)):
        torch.testing.assert_close(
            encoder.embed(alone, torch.tensor([0, len(alone)]))[0], together[i], atol=1e-5, rtol=0
        )


def test_order_within_a_sequence_matters():
    encoder = encoder_with_every_weight_random().eval()
    ids, offsets = packed_batch([6])
    assert (encoder.embed(ids, offsets) - encoder.embed(ids.flip(0), offsets)).abs().max() > 0.01


@pytest.mark.parametrize("lengths", [[4, 4, 4], [1, 7, 3]])
def test_packing_undoes_padding(lengths):
    layout = Layout(torch.tensor(np.concatenate([[0], np.cumsum(lengths)])))
    x = torch.arange(2.0 * sum(lengths)).view(-1, 2) + 1
    there = layout.pad(x)
    assert there.shape == (3, max(lengths), 2)
    assert (there == 0).all(dim=2).sum() == 3 * max(lengths) - sum(lengths)
    torch.testing.assert_close(layout.pack(there), x, rtol=0, atol=0)
    torch.testing.assert_close(layout.mean(x), torch.stack([part.mean(dim=0) for part in x.split(lengths)]))


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Layout(torch.tensor([0, 3, 3, 5]))


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(vocab_size=50, max_length=12, n_layers=2, n_embd=32, n_inner=48, dropout=0.5))
    ids, offsets = packed_batch()
    once, again = (encoder.train().hidden(ids, Layout(offsets)) for _ in range(2))
    assert not torch.equal(once, again)
    once, again = (encoder.eval().hidden(ids, Layout(offsets)) for _ in range(2))
    assert torch.equal(once, again)


def test_dropout_leaves_the_expected_attention_as_it_is():
    torch.manual_seed(0)
    share, n_draws, length = 0.25, 4_000, 6
    attention = Attention(EncoderConfig(vocab_size=50, n_embd=32, dropout=share))
    layout = Layout(torch.tensor([0, length]))
    layout.attend = lambda q, k, v: v  # a token's value, zero where it is dropped
    attention.out = nn.Identity()
    x = torch.randn(length, 32)
    with torch.no_grad():
        expected = attention.eval()(x, layout)
        drawn = torch.stack([attention.train()(x, layout) for _ in range(n_draws)])
    dropped = (drawn == 0).view(n_draws, length, 4, 8)
    assert torch.equal(dropped.all(dim=3), dropped.any(dim=3))
    assert within_five_sigma(int(dropped[..., 0].sum()), n_draws * length * 4, share)
    torch.testing.assert_close(drawn.amax(dim=0).abs() + drawn.amin(dim=0).abs(), expected.abs() / (1 - share))


def test_an_untrained_encoder_guesses_at_chance():
    torch.manual_seed(0)
    encoder = Encoder(SMALL).eval()
    ids, offsets = packed_batch()
    assert encoder(ids, offsets, ids).item() == pytest.approx(chance_loss(SMALL.vocab_size), rel=0.05)


def test_original_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(vocab_size=25_426))
    token_types = 2 * 256
    assert sum(weight.numel() for weight in encoder.parameters()) == 10_288_722 - token_types


def test_initial_weights_have_the_configured_spread():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(vocab_size=2_000, n_layers=2, init_std=0.05))
    for weight in (encoder.tokens.weight, encoder.layers[1].attention.qkv.weight, encoder.head.weight):
        assert weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert not encoder.layers[0].widen.bias.any()


def within_five_sigma(n_hits, n, p):
    return abs(n_hits - n * p) < 5 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_masking_follows_its_shares(share):
    n, vocab_size = 200_000, 1_000
    ids = torch.randint(N_SPECIAL, vocab_size, (n,), generator=torch.Generator().manual_seed(0))
    masked, targets = mask_tokens(ids, vocab_size, torch.Generator().manual_seed(1), share)
    chosen = targets != IGNORED
    n_chosen = int(chosen.sum())
    assert within_five_sigma(n_chosen, n, share)
    hidden, same = masked[chosen] == MASK, masked[chosen] == ids[chosen]
    random = ~hidden & ~same
    assert within_five_sigma(int(hidden.sum()), n_chosen, 0.8)
    in_vocabulary = vocab_size - N_SPECIAL  # a random token is the original once in so many
    assert within_five_sigma(int(random.sum()), n_chosen, 0.1 * (1 - 1 / in_vocabulary))
    assert within_five_sigma(int(same.sum()), n_chosen, 0.1 * (1 + 1 / in_vocabulary))
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert torch.equal(targets[chosen], ids[chosen])


def test_random_tokens_are_any_gene_and_never_special():
    ids = torch.full((20_000,), 3)
    masked, _ = mask_tokens(ids, 6, torch.Generator().manual_seed(0), share=1.0)
    assert set(masked[masked != MASK].tolist()) == {2, 3, 4, 5}


def test_at_least_one_token_is_chosen():
    for seed in range(50):
        masked, targets = mask_tokens(torch.tensor([7, 8]), 10, torch.Generator().manual_seed(seed), share=1e-6)
        assert (targets != IGNORED).sum() == 1
        assert (masked == MASK).sum() == 1


def test_masking_repeats_with_its_seed_and_leaves_the_ids():
    ids = torch.arange(2, 502)
    first, again, other = (mask_tokens(ids, 502, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert torch.equal(ids, torch.arange(2, 502))
