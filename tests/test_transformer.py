from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from datawall.models import transformer
from datawall.models.transformer import MASK, Encoder, EncoderConfig, Layout

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


def bert_with_the_weights_of(encoder):
    c = encoder.config
    sizes = {"vocab_size": c.vocab_size, "max_position_embeddings": c.max_length, "hidden_size": c.n_embd}
    sizes |= {"num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads, "intermediate_size": c.n_inner}
    dropout = {"hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": c.dropout}
    rest = {"hidden_act": "relu", "layer_norm_eps": 1e-12, "tie_word_embeddings": True}
    bert = BertForMaskedLM(BertConfig(**sizes, **dropout, **rest))
    names, theirs = their_names(c), {}
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
    ids = torch.randint(transformer.N_SPECIAL, SMALL.vocab_size, (sum(lengths),), generator=generator)
    return ids, torch.tensor(np.concatenate([[0], np.cumsum(lengths)]))


def masked_at(ids, vocab_size, seed, share=0.15):
    torch.manual_seed(seed)
    with mock.patch.object(transformer, "SHARE", share):
        return transformer.mask_tokens(ids, vocab_size)


def logits(encoder, hidden):
    return nn.functional.linear(
        encoder.head_norm(encoder.head(hidden).relu()), encoder.tokens.weight, encoder.head_bias
    )


def labels(ids, chosen, originals):
    """What transformers learns from: the token id at each position, or -100."""
    return torch.full_like(ids, -100).index_copy(0, chosen, originals)


def padded(packed, offsets, fill):
    return nn.utils.rnn.pad_sequence(packed.split(offsets.diff().tolist()), batch_first=True, padding_value=fill)


@pytest.mark.parametrize("lengths", [LENGTHS, [7, 7, 7]])
def test_logits_and_embedding_are_those_of_bert(lengths):
    encoder = encoder_with_every_weight_random().eval()
    bert = bert_with_the_weights_of(encoder).eval()
    ids, offsets = packed_batch(lengths)
    real = padded(torch.ones_like(ids), offsets, 0)
    with torch.no_grad():
        ours = logits(encoder, encoder.hidden(ids, Layout(offsets)))
        theirs = bert(input_ids=padded(ids, offsets, 0), attention_mask=real, output_hidden_states=True)
    assert theirs.logits.std() > 0.5  # weights large enough for a mistake to show
    torch.testing.assert_close(ours, theirs.logits[real.bool()], atol=1e-4, rtol=0)
    embedding = encoder.embed(ids, Layout(offsets))
    assert embedding.dtype == torch.float32
    assert not embedding.requires_grad
    of_cells = [cell[:n].mean(dim=0) for cell, n in zip(theirs.hidden_states[-2], lengths, strict=True)]
    torch.testing.assert_close(embedding, torch.stack(of_cells), atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [LENGTHS, [7, 7, 7]])
def test_training_loss_and_gradients_are_those_of_bert(lengths):
    encoder = encoder_with_every_weight_random().train()
    bert = bert_with_the_weights_of(encoder).train()
    ids, offsets = packed_batch(lengths)
    masked, *hidden = masked_at(ids, SMALL.vocab_size, 2, share=0.4)
    real, targets = padded(torch.ones_like(ids), offsets, 0), padded(labels(ids, *hidden), offsets, -100)
    ours = encoder(masked, Layout(offsets), *hidden)
    theirs = bert(input_ids=padded(masked, offsets, 0), attention_mask=real, labels=targets).loss
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    ours.backward()
    theirs.backward()
    names, gradients = their_names(SMALL), {name: weight.grad for name, weight in bert.named_parameters()}
    for name, weight in encoder.named_parameters():
        expected = torch.cat([gradients[their_name] for their_name in names[name]])
        torch.testing.assert_close(weight.grad, expected, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("lengths", [LENGTHS, [7, 7, 7]])
def test_all_ways_of_attending_give_the_same(lengths):
    layout = Layout(packed_batch(lengths)[1])
    torch.manual_seed(0)
    q, k, v = torch.randn(3, sum(lengths), 4, 8)
    where = layout.offsets, layout.offsets, layout.longest, layout.longest
    expected = []
    for a, b in zip(layout.offsets[:-1], layout.offsets[1:], strict=True):  # by the definition, in double precision
        weights = torch.einsum("qhd,khd->hqk", q[a:b].double(), k[a:b].double()).div(8**0.5).softmax(-1)
        expected.append(torch.einsum("hqk,khd->qhd", weights, v[a:b].double()))
    for attend in (transformer.attend_in_turn, transformer.attend_padded):
        torch.testing.assert_close(attend(q, k, v, *where), torch.cat(expected).float(), atol=1e-6, rtol=1e-5)
        half = attend(*(each.bfloat16() for each in (q, k, v)), *where)
        torch.testing.assert_close(half.float(), torch.cat(expected).float(), atol=0.03, rtol=0.03)


def test_what_attends_is_chosen_by_device(monkeypatch):
    assert transformer.attention(torch.device("cpu"), 64) is transformer.attend_in_turn
    assert transformer.attention(torch.device("meta"), 64) is transformer.attend_padded
    encoder, calls = encoder_with_every_weight_random().eval(), []
    ids, offsets = packed_batch()
    expected = encoder.embed(ids, Layout(offsets))

    def attend(*arguments):
        calls.append(arguments[3:])
        return transformer.attend_padded(*arguments)

    monkeypatch.setattr(transformer, "attention", lambda *_: attend)
    torch.testing.assert_close(encoder.embed(ids, Layout(offsets)), expected, atol=1e-5, rtol=0)
    assert len(calls) == SMALL.n_layers - 1
    assert all(longest == max(LENGTHS) and begins.dtype == torch.int32 for begins, _, longest, _ in calls)


def test_a_step_never_waits_for_the_device():
    """On the meta device there are no values: what asks for one (`.item()`, `.tolist()`, a boolean index) fails."""
    encoder = Encoder(EncoderConfig(vocab_size=50, max_length=12, n_layers=2, n_embd=32, n_inner=48)).to("meta").train()
    ids, offsets = packed_batch()
    masked, *hidden = (each.to("meta") for each in masked_at(ids, 50, 0))
    encoder(masked, Layout(offsets, "meta"), *hidden).backward()
    assert all(weight.grad.shape == weight.shape for weight in encoder.parameters())
    for waits in (lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x[x > 0], torch.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            waits(masked)


@pytest.mark.parametrize("n_logits", [1, 170, 2**22])
def test_loss_and_gradients_do_not_depend_on_the_logits_at_once(monkeypatch, n_logits):
    monkeypatch.setitem(transformer.LOGITS_AT_ONCE, "cpu", n_logits)
    encoder = encoder_with_every_weight_random()
    ids, offsets = packed_batch()
    _, chosen, originals = masked_at(ids, 50, 3, share=0.5)
    loss = encoder(ids, Layout(offsets), chosen, originals)
    (3 * loss).backward()
    ours = [weight.grad.clone() for weight in encoder.parameters()]
    encoder.zero_grad()
    whole = nn.functional.cross_entropy(logits(encoder, encoder.hidden(ids, Layout(offsets))[chosen]), originals)
    (3 * whole).backward()
    torch.testing.assert_close(loss, whole, atol=1e-6, rtol=1e-6)
    for weight, expected in zip(encoder.parameters(), ours, strict=True):
        torch.testing.assert_close(expected, weight.grad, atol=1e-6, rtol=1e-5)


def test_logits_are_never_whole_in_memory(monkeypatch):
    monkeypatch.setitem(transformer.LOGITS_AT_ONCE, "cpu", 200 * 50)
    encoder, n = encoder_with_every_weight_random(), 4_000
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            tensors = [each for each in (out if isinstance(out, tuple) else [out]) if isinstance(each, torch.Tensor)]
            largest.extend(each.numel() for each in tensors)
            return out

    hidden, originals = torch.randn(n, 32, requires_grad=True), torch.randint(0, 50, (n,))
    with Sizes():
        loss = transformer._CrossEntropy.apply(hidden, encoder.tokens.weight, encoder.head_bias, originals, True)
        loss.backward()
    assert max(largest) == n * 32  # the gradient of the inputs, where all logits would be n * 50


def test_what_follows_attention_is_compiled_in_one_piece():
    layer = encoder_with_every_weight_random().layers[0]
    compiled = torch.compile(transformer.Layer.finish, dynamic=True, fullgraph=True, backend="aot_eager")
    for n in (7, 12):
        x, attended = torch.randn(2, n, 32)
        torch.testing.assert_close(compiled(layer, x, attended), layer.finish(x, attended))


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Layout(torch.tensor([0, 3, 3, 5]))


def test_dropout_leaves_the_expected_attention_as_it_is():
    torch.manual_seed(0)
    share, n_draws, length = 0.25, 4_000, 6
    attends = transformer.Attention(EncoderConfig(vocab_size=50, n_embd=32, dropout=share))
    layout = Layout(torch.tensor([0, length]))
    x = torch.randn(length, 32)

    def value(q, k, v, *_):  # a token's, zero where it is dropped
        return v

    with torch.no_grad():
        expected = attends.eval()(x, layout, value)
        drawn = torch.stack([attends.train()(x, layout, value) for _ in range(n_draws)])
    dropped = (drawn == 0).view(n_draws, length, 4, 8)
    assert torch.equal(dropped.all(dim=3), dropped.any(dim=3))
    assert within_five_sigma(int(dropped[..., 0].sum()), n_draws * length * 4, share)
    torch.testing.assert_close(drawn.amax(dim=0).abs() + drawn.amin(dim=0).abs(), expected.abs() / (1 - share))


def test_initial_weights_have_the_configured_spread():
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(vocab_size=2_000, n_layers=2, init_std=0.05))
    for weight in (encoder.tokens.weight, encoder.layers[1].attention.qkv.weight, encoder.head.weight):
        assert weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert not encoder.layers[0].widen.bias.any()


def within_five_sigma(n_hits, n, p):
    return abs(n_hits - n * p) < 5 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_masking_follows_its_shares_and_its_seed(share):
    n, vocab_size = 200_000, 1_000
    ids = torch.randint(transformer.N_SPECIAL, vocab_size, (n,), generator=torch.Generator().manual_seed(0))
    masked, chosen, originals = masked_at(ids, vocab_size, 1, share)
    n_chosen = len(chosen)
    assert within_five_sigma(n_chosen, n, share)
    hidden, same = masked[chosen] == MASK, masked[chosen] == ids[chosen]
    random = ~hidden & ~same
    assert within_five_sigma(int(hidden.sum()), n_chosen, 0.8)
    in_vocabulary = vocab_size - transformer.N_SPECIAL  # a random token is the original once in so many
    assert within_five_sigma(int(random.sum()), n_chosen, 0.1 * (1 - 1 / in_vocabulary))
    assert within_five_sigma(int(same.sum()), n_chosen, 0.1 * (1 + 1 / in_vocabulary))
    assert torch.equal(masked.index_copy(0, chosen, originals), ids)
    assert torch.equal(originals, ids[chosen])
    assert not torch.equal(masked_at(ids, vocab_size, 2, share)[1], chosen)


def test_random_tokens_are_any_gene_and_never_special():
    ids = torch.full((20_000,), 3)
    masked, *_ = masked_at(ids, 6, 0, share=1.0)
    assert set(masked[masked != MASK].tolist()) == {2, 3, 4, 5}


def test_at_least_one_token_is_chosen():
    for seed in range(50):
        masked, chosen, _ = masked_at(torch.tensor([7, 8]), 10, seed, share=1e-6)
        assert len(chosen) == 1
        assert (masked == MASK).sum() == 1
