"""objkern.transformers: a model's loss by the fused linear path, and Trainer's, against the same formula on logits."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

import objkern  # noqa: E402
from objkern import L2SP, CrossEntropy, Entropy, KLDivergence, ZLoss  # noqa: E402
from objkern.transformers import (  # noqa: E402
    DeferredLogits,
    Layer,
    attach,
    compute_loss_func,
    detach,
    is_attached,
    parts,
)  # fmt: skip

V, D, B, T = 211, 32, 3, 17
SMALL = {"vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
SEQ2SEQ = {"vocab_size": V, "d_model": D, "pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2,
           "bos_token_id": 1, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
           "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
           "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}  # fmt: skip
OBJECTIVE = CrossEntropy(label_smoothing=0.1) + 1e-2 * ZLoss() - 0.05 * Entropy()


def llama(**options: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **options))


def bart() -> nn.Module:
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**SEQ2SEQ))
    model.final_logits_bias.normal_()
    return model


def t5(tied: bool) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=V, d_model=D, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, decoder_start_token_id=0, eos_token_id=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_embd=D, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
    "gemma2, capped": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
        **SMALL, head_dim=8, final_logit_softcapping=1.5, query_pre_attn_scalar=8)),
    "cohere, scaled": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**SMALL, logit_scale=0.25)),
    "granite, divided": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(
        **SMALL, logits_scaling=3.0)),
    "mixtral, router": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(
        **SMALL, num_local_experts=2, output_router_logits=True)),
    "t5": lambda: t5(False),
    "t5, tied": lambda: t5(True),
    "bart, bias": bart,
}  # fmt: skip


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # logits that are not all alike
    return model.train()


def batch_of(model: nn.Module, rows: int = B, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (rows, T), generator=generator)
    labels = ids.clone()
    labels[:, : 2 + seed] = -100
    labels[0, -3:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def by_hand(model: nn.Module, objective: objkern.Objective, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """The formula on the logits, which are those of a call without labels."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if model.config.is_encoder_decoder:
        shifted = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        outputs = model(**inputs, decoder_input_ids=shifted)
        return objective(outputs.logits, batch["labels"], backend="reference", **options)
    outputs = model(**inputs)
    loss = objective(outputs.logits, batch["labels"], shift=1, backend="reference", **options)
    if "router_logits" in outputs:
        stock = model(**batch)
        return loss + model.router_aux_loss_coef * stock.aux_loss
    return loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Largest(TorchDispatchMode):
    """The most memory that a tensor had which was made meanwhile, in float32 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(found):
            if isinstance(x, Tensor) and not x.is_meta:
                self.elements = max(self.elements, x.untyped_storage().nbytes() / 4)
        return found


# ---- attach ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_formula(name: str) -> None:
    model = made(name)
    batch = batch_of(model)
    expected = by_hand(model, OBJECTIVE, batch)
    truth = gradients(model, expected)
    attach(model, OBJECTIVE)
    outputs = model(**batch)
    assert isinstance(outputs.logits, DeferredLogits)
    torch.testing.assert_close(outputs.loss, expected.detach(), rtol=1e-5, atol=1e-6, check_dtype=False)
    found = gradients(model, outputs.loss)
    assert found.keys() == truth.keys()
    for key, gradient in truth.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-9)
    assert parts(model)["cross_entropy"].isfinite()
    assert not any(value.requires_grad for value in parts(model).values())


@pytest.mark.parametrize("name", ["llama", "gemma2, capped", "t5", "bart, bias"])
def test_logits_are_never_materialised(name: str) -> None:
    model = made(name)
    batch = batch_of(model, rows=8)
    attach(model, OBJECTIVE, chunk_rows=8)
    with Largest() as largest:
        model(**batch).loss.backward()
    assert largest.elements < 8 * T * V / 2
    detach(model)
    with Largest() as largest:
        model(**batch).loss.backward()
    assert largest.elements >= 8 * T * V  # the measure sees them where they are


@pytest.mark.parametrize("name", ["llama", "gemma2, capped", "t5", "bart, bias"])
def test_detach_restores_the_model(name: str) -> None:
    model, batch = made(name), batch_of(made(name))
    keys = set(model.__dict__), set(model.get_output_embeddings().__dict__)
    before = model(**batch)
    attach(model, OBJECTIVE)
    attach(model, CrossEntropy())  # replaces
    assert "z_loss" not in (model(**batch).loss is not None and parts(model))
    assert detach(model) is model
    assert (set(model.__dict__), set(model.get_output_embeddings().__dict__)) == keys
    after = model(**batch)
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(before.logits, after.logits)
    with pytest.raises(ValueError, match="no objective is attached"):
        parts(model)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_has_logits_and_the_same_loss(name: str) -> None:
    model = made(name).eval()
    batch = batch_of(model)
    stock = model(**batch)
    expected = by_hand(model, OBJECTIVE, batch)
    attach(model, OBJECTIVE)
    with torch.no_grad():
        outputs = model(**batch)
    torch.testing.assert_close(outputs.loss, expected.detach(), rtol=1e-5, atol=1e-6, check_dtype=False)
    assert type(outputs.logits) is Tensor
    torch.testing.assert_close(outputs.logits, stock.logits.detach(), rtol=1e-4, atol=1e-4)
    as_tuple = model(**batch, return_dict=False)
    torch.testing.assert_close(as_tuple[0].detach(), outputs.loss, rtol=1e-6, atol=1e-7)
    assert all(not isinstance(value, DeferredLogits) for value in as_tuple)
    without = {key: value for key, value in batch.items() if key != "labels"}
    if not model.config.is_encoder_decoder:
        assert torch.equal(model(**without).logits, stock.logits)


def test_labels_may_come_by_position() -> None:
    model, batch = made("llama"), batch_of(made("llama"))
    attach(model, OBJECTIVE)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    positional = [batch.get(name) for name in names[: names.index("labels") + 1]]
    assert torch.equal(model(*positional).loss, model(**batch).loss)
    for without in (positional[:-1], [*positional[:-1], None]):
        assert type(model(*without).logits) is Tensor


def test_without_labels_nothing_differs() -> None:
    model, batch = made("llama"), batch_of(made("llama"))
    expected = model(input_ids=batch["input_ids"]).logits
    attach(model, OBJECTIVE)
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, expected)


def test_is_attached() -> None:
    model, reference = made("llama"), frozen("llama")
    assert not is_attached(model)
    attach(model, WITH_REFERENCE, reference=reference)
    assert is_attached(model)
    assert is_attached(model, WITH_REFERENCE, reference)
    assert not is_attached(model, OBJECTIVE)
    assert not is_attached(model, WITH_REFERENCE, made("llama"))
    assert not is_attached(detach(model), WITH_REFERENCE, reference)


def test_a_forward_that_somebody_has_put_there() -> None:
    """It is called, and is there again afterwards; that of a reference's head too."""
    model, reference, batch = made("llama"), frozen("llama"), batch_of(made("llama"))
    expected = attach(made("llama"), WITH_REFERENCE, reference=reference)(**batch).loss
    calls = []

    def counting(module: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return type(module).forward(module, *args, **kwargs)

        return forward

    own = {module: counting(module) for module in (model, model.lm_head, reference.lm_head)}
    for module, forward in own.items():
        module.forward = forward
    attach(model, WITH_REFERENCE, reference=reference)
    assert torch.equal(model(**batch).loss, expected)
    assert calls == [model]
    detach(model)
    assert all(module.__dict__["forward"] is forward for module, forward in own.items())


def test_logits_to_keep() -> None:
    """The labels of the kept positions, as the model's own loss would have them."""
    model, batch = made("llama"), batch_of(made("llama"))
    keep = 6
    kept = {**batch, "labels": batch["labels"][:, -keep:]}
    logits = model(input_ids=batch["input_ids"], logits_to_keep=keep).logits
    expected = OBJECTIVE(logits, kept["labels"], shift=1, backend="reference")
    attach(model, OBJECTIVE)
    torch.testing.assert_close(model(**kept, logits_to_keep=keep).loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2, capped"])
def test_a_window_of_batches_is_one_big_batch(name: str) -> None:
    """24: sums over all batches divided by `num_items_in_batch`, terms on parameters once a window."""
    model = made(name)
    objective = OBJECTIVE + 0.1 * L2SP(model)
    with torch.no_grad():
        for p in model.parameters():  # away from where it began
            p.mul_(1.01)
    batches = [batch_of(model, rows=rows, seed=seed) for seed, rows in enumerate((3, 1, 2))]
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    attach(model, objective)
    loss = model(**whole).loss
    truth = gradients(model, loss)
    count = (whole["labels"][:, 1:] != -100).sum()
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        part = model(**batch, num_items_in_batch=count).loss
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-5)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, truth[key], rtol=1e-4, atol=1e-5 * truth[key].abs().max().item() + 1e-9)


def test_gradient_checkpointing_and_autocast() -> None:
    model = made("llama")
    batch = batch_of(model)
    attach(model, OBJECTIVE)
    truth = gradients(model, model(**batch).loss)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name until 5.x
    found = gradients(model, model(**batch).loss)
    for key, gradient in truth.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-7)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=2e-2)


def test_compiles_into_one_graph() -> None:
    model = made("llama")
    batch = batch_of(model)
    attach(model, OBJECTIVE)
    expected = model(**batch).loss
    truth = gradients(model, expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(**batch).loss
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    found = gradients(model, loss)
    for key, gradient in truth.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["nothing", "head", "body", "all but the head's input"])
def test_what_is_frozen_has_no_gradient(frozen: str) -> None:
    """23: each of head and hidden states with and without a gradient."""
    model = made("llama")
    batch = batch_of(model)
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    for p in model.parameters():
        p.requires_grad_(frozen == "nothing" or (frozen == "head" and id(p) not in head) or
                         (frozen == "body" and id(p) in head))  # fmt: skip
    if frozen.startswith("all"):
        model.model.norm.weight.requires_grad_()
    truth = gradients(model, by_hand(model, OBJECTIVE, batch))
    attach(model, OBJECTIVE)
    found = gradients(model, model(**batch).loss)
    assert found.keys() == truth.keys() != set()
    for key, gradient in truth.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-9)


@pytest.mark.parametrize("on_head", [False, True])
def test_lora(on_head: bool) -> None:
    """23: adapters of the head have the gradients that they have without objkern."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", *(["lm_head"] if on_head else [])]
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(made("llama"), config).train()
    batch = batch_of(model)
    truth = gradients(model, by_hand(model, OBJECTIVE, batch))
    assert attach(model, OBJECTIVE) is model
    outputs = model(**batch)
    found = gradients(model, outputs.loss)
    assert found.keys() == truth.keys()
    assert any("lm_head" in key for key in found) == on_head
    for key, gradient in truth.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
    with model.disable_adapter():
        plain = model(**batch).loss
    assert plain != outputs.loss
    detach(model)
    torch.testing.assert_close(by_hand(model, OBJECTIVE, batch), outputs.loss, rtol=1e-5, atol=1e-6)


def test_lora_that_cannot_be_folded_in_is_an_error() -> None:
    peft = pytest.importorskip("peft")
    for options, message in (({"lora_dropout": 0.1}, "dropout"), ({"use_dora": True}, "DoRA")):
        config = peft.LoraConfig(r=4, target_modules=["lm_head"], **options)
        model = peft.get_peft_model(made("llama"), config)
        with pytest.raises(NotImplementedError, match=message):
            attach(model, OBJECTIVE)


def test_what_cannot_be_attached() -> None:
    model = made("llama")
    with pytest.raises(TypeError, match=r"objective: expected an objkern\.Objective"):
        attach(model, F.cross_entropy)
    with pytest.raises(TypeError, match="model: expected"):
        attach("llama", OBJECTIVE)
    with pytest.raises(ValueError, match=r"reference: KLDivergence.* needs one but got None"):
        attach(model, CrossEntropy() + KLDivergence())
    with pytest.raises(ValueError, match="reference: no term reads it"):
        attach(model, CrossEntropy(), reference=made("llama"))
    with pytest.raises(ValueError, match="reference: expected another model"):
        attach(model, CrossEntropy() + KLDivergence(), reference=model)
    other = llama()
    other.resize_token_embeddings(V + 1)
    with pytest.raises(ValueError, match=f"reference: expected a head of {V} classes but got one of {V + 1}"):
        attach(model, CrossEntropy() + KLDivergence(), reference=other)
    with pytest.raises(NotImplementedError, match="element by element"):
        attach(model, objkern.MeanSquaredError() + 0.0 * objkern.LogitL2())
    with pytest.raises(ValueError, match="weight"):
        attach(model, CrossEntropy(weight=torch.ones(V + 1)))
    encoder = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL, num_labels=3))
    with pytest.raises(TypeError, match="no language-model head"):
        attach(encoder, OBJECTIVE)
    assert "_objkern_attached" not in model.__dict__
    for head, message in (
        (nn.Bilinear(D, D, V), "its head is a Bilinear, and attach needs a linear layer"),
        (SimpleNamespace(base_layer=model.lm_head), "SimpleNamespace on Linear, and no LoRA on a linear"),
    ):
        model.get_output_embeddings = lambda head=head: head
        with pytest.raises(TypeError, match=message):
            attach(model, OBJECTIVE)


WITH_REFERENCE = CrossEntropy() + 0.1 * ZLoss() + 0.7 * KLDivergence() + 0.3 * KLDivergence("reverse")


def divergence_by_hand(z: Tensor, r: Tensor, y: Tensor) -> Tensor:
    """`WITH_REFERENCE` of full logits, (N, V), in float64."""
    z, r = z[y != -100].double(), r[y != -100].double()
    log_p, log_q = z.log_softmax(-1), r.log_softmax(-1)
    loss = F.cross_entropy(z, y[y != -100]) + 0.1 * z.logsumexp(-1).square().mean()
    forward = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    return loss + 0.7 * forward + 0.3 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def frozen(name: str) -> nn.Module:
    """A model of other weights than `made` gives, that evaluates."""
    model = made(name).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


# the model, its reference, and whether texts are packed: every head; another scale than the model's; another bias
PAIRS = {
    "llama": ("llama", "llama", False), "llama, packed": ("llama", "llama", True),
    "llama beside tied": ("llama", "llama, tied", True), "capped": ("gemma2, capped", "gemma2, capped", False),
    "scaled beside divided": ("cohere, scaled", "granite, divided", False), "plain beside scaled": ("llama", "cohere, scaled", False),
    "t5": ("t5", "t5", False), "t5 beside tied": ("t5", "t5, tied", False), "bart, bias": ("bart, bias", "bart, bias", False),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_a_reference_is_that_of_the_formula(pair: str) -> None:
    """Value and gradients against full logits of both in float64; nothing happens to the reference."""
    name, of_reference, packed = PAIRS[pair]
    model, reference = made(name), frozen(of_reference)
    if "final_logits_bias" in reference._buffers:
        reference.final_logits_bias.normal_()
    batch = batch_of(model)
    if packed:  # two texts in each sequence, whose attentions transformers keeps apart by their positions
        del batch["attention_mask"]
        batch["position_ids"] = torch.cat([torch.arange(9), torch.arange(T - 9)]).expand(B, T)
        batch["labels"][:, 9] = -100
    else:
        batch["attention_mask"][0, -3:] = 0
    inputs = {key: value for key, value in batch.items() if key != "labels"} | {"use_cache": False}
    labels = batch["labels"]
    if "t5" in name:  # whose logits `made` has so large that any two models agree
        for some in (model, reference):
            some.get_output_embeddings().weight.data.mul_(0.02)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    else:
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        r = reference(**inputs).logits
    expected = divergence_by_hand(model(**inputs).logits.flatten(0, 1), r.flatten(0, 1), labels.flatten())
    truth = gradients(model, expected)
    before = {key: x.clone() for key, x in reference.state_dict().items()}
    assert attach(model, WITH_REFERENCE, reference=reference) is model
    loss = model(**batch, use_cache=False).loss
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert parts(model)["kl_divergence"] > 1e-3
    found = gradients(model, loss)
    assert found.keys() == truth.keys()
    for key, gradient in truth.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-9)
    assert all(p.grad is None for p in reference.parameters())
    assert all(torch.equal(x, before[key]) for key, x in reference.state_dict().items())
    assert "forward" not in reference.get_output_embeddings().__dict__
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, use_cache=False).loss, loss.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "t5", "bart, bias"])
def test_logits_of_a_reference_are_never_materialised(name: str) -> None:
    model, batch = made(name), batch_of(made(name), rows=8)
    attach(model, WITH_REFERENCE, chunk_rows=8, reference=frozen(name))
    with Largest() as largest:
        model(**batch).loss.backward()
    assert largest.elements < 8 * T * V / 2


def test_a_reference_that_cannot_be_had_is_an_error() -> None:
    model, batch = made("gemma2, capped"), batch_of(made("gemma2, capped"))
    attach(model, WITH_REFERENCE, reference=frozen("llama"))
    with pytest.raises(
        NotImplementedError, match=r"reference: its logits have the softcap None, the model's have 1\.5"
    ):
        model(**batch)
    model = attach(made("llama"), WITH_REFERENCE, reference=frozen("llama"))
    vectors = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(NotImplementedError, match=r"reference: expected the numbers of tokens.* but got inputs_embeds"):
        model(inputs_embeds=vectors, labels=batch["labels"])
    logits = model(**batch).logits
    with pytest.raises(ValueError, match=r"reference: expected hidden states of \(3, 4\) positions but got \(3, 17\)"):
        logits.beside(torch.zeros(B, 4, D), 1.0, None)
    with pytest.raises(NotImplementedError, match=r"have the softcap 5\.0, the model's have 6\.0"):
        (torch.tanh(logits / 5.0) * 5.0).beside(torch.zeros(B, T, D), 1.0, 6.0)
    reference = frozen("llama")
    attach(model, WITH_REFERENCE, reference=reference)
    stock = type(reference).forward
    reference.forward = lambda **inputs: SimpleNamespace(logits=stock(reference, **inputs).logits - 1.0)
    with pytest.raises(NotImplementedError, match="does more with its logits than scale, cap and shift them"):
        model(**batch)


def test_a_reference_of_another_scale_with_a_bias() -> None:
    hidden, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    own = DeferredLogits(None, hidden, Layer(weight, bias), scale=3.0)
    for scale in (2.0, torch.tensor(2.0)):
        h, w, b = own.beside(torch.zeros(2, 3, 7), scale, None)
        torch.testing.assert_close(2.0 * F.linear(h, w, b), own.materialize())


def test_copies_are_attached_by_themselves() -> None:
    model, batch = made("llama"), batch_of(made("llama"))
    attach(model, OBJECTIVE)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    assert other(**batch).loss != model(**batch).loss
    detach(model)
    torch.testing.assert_close(other(**batch).loss, by_hand(detach(copy.deepcopy(other)), OBJECTIVE, batch),
                               rtol=1e-5, atol=1e-6)  # fmt: skip


def test_an_attached_model_is_pickled() -> None:
    model, batch = attach(made("llama"), OBJECTIVE), batch_of(made("llama"))
    other = pickle.loads(pickle.dumps(model))
    assert isinstance(other(**batch).logits, DeferredLogits)
    assert torch.equal(other(**batch).loss, model(**batch).loss)
    assert inspect.signature(other.forward) == inspect.signature(llama().forward)
    assert "forward" not in detach(other).__dict__


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_a_head_that_is_resized_after_it_was_attached(name: str) -> None:
    model = attach(made(name), OBJECTIVE)
    model.resize_token_embeddings(V + 5)
    batch = batch_of(model)
    outputs = model(**batch)
    assert isinstance(outputs.logits, DeferredLogits)
    assert outputs.logits.shape[-1] == V + 5
    torch.testing.assert_close(outputs.loss, by_hand(detach(model), OBJECTIVE, batch), rtol=1e-5, atol=1e-6)


def test_a_head_that_peft_wraps_after_it_was_attached() -> None:
    peft = pytest.importorskip("peft")
    model = attach(made("llama"), OBJECTIVE)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["lm_head"]))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    batch = batch_of(model)
    outputs = wrapped.train()(**batch)
    assert isinstance(outputs.logits, DeferredLogits)
    outputs.loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in wrapped.named_parameters() if "lora" in name)
    torch.testing.assert_close(outputs.loss, by_hand(detach(wrapped), OBJECTIVE, batch), rtol=1e-5, atol=1e-6)


# ---- the stand-in ---------------------------------------------------------------------------------------------------


@pytest.fixture
def deferred() -> tuple[DeferredLogits, Tensor]:
    model = attach(made("llama"), CrossEntropy())
    batch = batch_of(model)
    return model(**batch).logits, model(**batch).logits.materialize().detach()


CHAINS: dict[str, tuple[bool, Callable[[Any], Any]]] = {
    "half": (True, lambda z: z * 0.5), "from the left": (True, lambda z: 2 * z), "divided": (True, lambda z: z / 3.0),
    "by a tensor": (True, lambda z: z * torch.tensor(0.7)), "cap": (True, lambda z: torch.tanh(z / 5.0) * 5.0),
    "odd cap": (True, lambda z: -3.0 * torch.tanh(z * 0.2)), "method": (True, lambda z: (z / 2).tanh()),
    "bias": (True, lambda z: z + torch.linspace(0, 1, V)), "biases": (True, lambda z: z + torch.ones(1, V) + 1 * torch.ones(V)),
    "float": (True, lambda z: z.float()), "double": (True, lambda z: z.to(torch.float64)),
    "flat": (True, lambda z: z.view(-1, V)), "reshaped": (True, lambda z: z.reshape((B * T, -1))),
    "shifted": (True, lambda z: z[..., :-1, :].contiguous().view(-1, z.size(-1))), "first": (True, lambda z: z[0]),
    "last": (True, lambda z: z[:, -1]), "range": (True, lambda z: z[:, 2:9, :]),
    "mask": (True, lambda z: z[torch.arange(B * T).view(B, T) % 2 == 0]),
    "classes": (False, lambda z: z[..., :7]), "sum": (False, lambda z: z.sum()), "argmax": (False, lambda z: z.argmax(-1)),
    "softmax": (False, lambda z: torch.softmax(z, -1)), "added": (False, lambda z: z + z), "minus": (False, lambda z: z - 1.0),
    "reflected": (False, lambda z: 1.0 - z), "compared": (False, lambda z: z > 0), "stacked": (False, lambda z: torch.stack([z, z])),
    "twice capped": (False, lambda z: torch.tanh(torch.tanh(z))), "bias after a scale": (False, lambda z: 2.0 * z + torch.ones(V)),
    "classes by place": (False, lambda z: z[:, :, :7]), "every one": (False, lambda z: z[torch.ones(B, T, V, dtype=torch.bool)]),
    "rows": (False, lambda z: z.reshape(B, -1)), "one row": (False, lambda z: z.view(B * T * V)),
    "by a vector": (False, lambda z: z * torch.linspace(1, 2, V)), "over a vector": (False, lambda z: z / torch.linspace(1, 2, V)),
    "a cap by a tensor": (False, lambda z: torch.tanh(z) * torch.tensor(2.0)), "bias after a cap": (False, lambda z: torch.tanh(z) + torch.ones(V)),
    "bias after a tensor": (False, lambda z: z * torch.tensor(2.0) + torch.ones(V)),
    "bias that learns": (False, lambda z: (z + torch.ones(V, requires_grad=True)).detach()),
    "by name": (False, lambda z: torch.softmax(input=z, dim=-1)), "there already": (True, lambda z: z.to("cpu")),
    "transposed": (False, lambda z: z.transpose(0, 1)), "other view": (False, lambda z: z.view(-1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_the_stand_in_is_the_tensor(name: str, deferred: tuple[DeferredLogits, Tensor]) -> None:
    stays, chain = CHAINS[name]
    found, expected = chain(deferred[0]), chain(deferred[1])
    assert isinstance(found, DeferredLogits) == stays
    assert tuple(found.shape) == tuple(expected.shape)
    assert found.dtype == expected.dtype
    tensor = found.materialize() if stays else found
    torch.testing.assert_close(tensor.detach(), expected, rtol=1e-5, atol=1e-5)
    if stays and expected.dim() == 2:
        y = torch.randint(0, V, expected.shape[:1], generator=torch.Generator().manual_seed(0))
        y[1] = -100
        for loss in (F.cross_entropy(found, y), F.cross_entropy(input=found, target=y)):
            torch.testing.assert_close(loss.double(), F.cross_entropy(expected.double(), y), rtol=1e-5, atol=1e-5)


def _set_classes(z: Any) -> None:
    z[:, :, :3] = -2.0


def _raise_rows(z: Any) -> None:
    z[:, ::2].add_(torch.arange(float(V)))


def _fill(z: Any) -> None:
    z.masked_fill_(torch.arange(V) < 10, -5.0)


EDITS: dict[str, Callable[[Any], Any]] = {
    "divided": lambda z: z.div_(3.0), "filled": _fill, "added": lambda z: z.add_(torch.arange(float(V))),
    "by a view": lambda z: z.view(-1, V).mul_(0.5), "by a view of a view": lambda z: z.view(-1, V).view(B, T, V).mul_(0.5),
    "by a function": lambda z: F.relu_(z), "by an option": lambda z: F.relu(z, inplace=True),
    "by its data": lambda z: z.data.mul_(2.0), "by a detached one": lambda z: z.detach().mul_(2.0), "classes": _set_classes,
    "by the same in another dtype": lambda z: z.float().mul_(2.0), "read, then divided": lambda z: (z.sum(), z.div_(3.0)),
}  # fmt: skip


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", EDITS)
def test_what_a_model_changes_in_place_the_loss_sees(
    name: str, late: bool, train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is changed behind the view that goes into the loss."""
    model = made("llama").train(train)

    def forward(self: Any, input_ids: Tensor, labels: Tensor, **_: Any) -> Any:
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        last = logits.view(-1, V) if late else None
        EDITS[name](logits)
        last = logits.view(-1, V) if last is None else last
        return transformers.modeling_outputs.CausalLMOutputWithPast(
            loss=F.cross_entropy(last[:-1], labels.view(-1)[1:]), logits=logits
        )

    monkeypatch.setattr(type(model), "forward", forward)
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    found = []
    for attached in (False, True):
        model.zero_grad()
        outputs = (attach(model, CrossEntropy()) if attached else model)(input_ids=ids, labels=ids)
        outputs.loss.backward()
        found.append([outputs.loss, model.lm_head.weight.grad.clone(), torch.as_tensor(outputs.logits + 0.0)])
        if attached and "read" not in name:
            torch.testing.assert_close(parts(model)["total"], outputs.loss)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_a_model_whose_loss_the_objective_does_not_see_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")

    def forward(self: Any, input_ids: Tensor, labels: Tensor, **_: Any) -> Any:
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state) - 1.0
        loss = F.cross_entropy(logits.view(-1, V), labels.view(-1))
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    monkeypatch.setattr(type(model), "forward", forward)
    attach(model, CrossEntropy())
    with pytest.raises(NotImplementedError, match="in a way that the objective does not see"):
        model(**batch_of(model))


def test_rows_that_a_model_changes_in_place_are_an_error(deferred: tuple[DeferredLogits, Tensor]) -> None:
    z = deferred[0]
    assert z[:, ::2].argmax() >= 0  # to be read they may be made alone
    assert not z.is_materialized()
    flat = z.view(-1, V)
    _raise_rows(z)
    for logits in (z, flat):
        with pytest.raises(NotImplementedError, match="some rows of its logits in place"):
            logits.loss(torch.zeros(logits.shape[:-1], dtype=torch.long))


def test_views_of_a_tensor_are_of_that_tensor(deferred: tuple[DeferredLogits, Tensor]) -> None:
    z = deferred[0]
    flat, some = z.view(-1, V), z[:, 2:5]
    z.mul_(2.0)
    _raise_rows(z)
    assert flat.materialize().data_ptr() == z.materialize().data_ptr()
    assert torch.equal(some.materialize(), z.materialize()[:, 2:5])


def test_a_copy_is_of_what_the_logits_were(deferred: tuple[DeferredLogits, Tensor]) -> None:
    z, before = deferred[0], deferred[1]
    y = torch.zeros(B, T, dtype=torch.long)
    rows = torch.arange(B * T).view(B, T) % 2 == 0
    early = z.to(torch.float64), z[rows], 1.0 * z
    z.mul_(2.0)
    late = z.to(torch.float64), z[rows]
    z.mul_(2.0)
    for copies, factor in ((early, 1.0), (late, 2.0)):
        torch.testing.assert_close(torch.as_tensor(copies[0] + 0.0), factor * before.double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.as_tensor(copies[1] + 0.0), factor * before[rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(early[2].loss(y), F.cross_entropy(before.view(-1, V), y.view(-1)))
    torch.testing.assert_close(z.loss(y), F.cross_entropy(4.0 * before.view(-1, V), y.view(-1)))


def test_what_is_known_without_the_tensor(deferred: tuple[DeferredLogits, Tensor]) -> None:
    z, tensor = deferred[0][:], deferred[1]
    assert (z.size(), z.size(1), z.dim(), z.ndim, z.numel()) == (tensor.shape, T, 3, 3, tensor.numel())
    assert (z.device, z.is_cuda, z.requires_grad, hash(z) == hash(z)) == (tensor.device, False, True, True)
    assert z._tensor is None
    assert torch.equal(copy.copy(z).materialize(), z.materialize())
    assert z.to("meta").is_meta
    assert z.view(torch.int32).dtype == torch.int32


def test_a_model_that_weighs_its_loss_by_itself_is_an_error(deferred: tuple[DeferredLogits, Tensor]) -> None:
    flat = deferred[0].view(-1, V)
    with pytest.raises(NotImplementedError, match="weighs or smooths"):
        F.cross_entropy(flat, torch.zeros(B * T, dtype=torch.long), label_smoothing=0.1)


# ---- Trainer --------------------------------------------------------------------------------------------------------

ROWS = 7


def encoder(kind: str, **options: Any) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip
    return getattr(transformers, f"BertFor{kind}")(config)


def random(*shape: int, below: int = V) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(sum(shape)))


def masked(labels: Tensor) -> Tensor:
    """Another number of labels in every row."""
    keep = torch.arange(labels.shape[1]) >= 3 + 2 * torch.arange(len(labels))[:, None] % 11
    return labels.where(keep, -100)


BCE, MSE = objkern.BinaryCrossEntropy() + 0.1 * objkern.LogitL2(), objkern.MeanSquaredError() + 0.0 * objkern.Huber()

# model, labels, objective, its eager formula on the model's outputs and all labels
HEADS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], objkern.Objective, Callable[..., Tensor]]] = {
    "causal": (llama, lambda: masked(random(ROWS, T)), OBJECTIVE,
               lambda out, y: OBJECTIVE(out.logits, y, shift=1, backend="reference")),
    "seq2seq": (bart, lambda: masked(random(ROWS, T)), OBJECTIVE,
                lambda out, y: OBJECTIVE(out.logits, y, backend="reference")),
    "tokens": (lambda: encoder("TokenClassification", num_labels=5), lambda: masked(random(ROWS, T, below=5)), OBJECTIVE,
               lambda out, y: OBJECTIVE(out.logits, y, backend="reference")),
    "sequence": (lambda: encoder("SequenceClassification", num_labels=4), lambda: random(ROWS, below=4), OBJECTIVE,
                 lambda out, y: OBJECTIVE(out.logits, y, backend="reference")),
    "labels": (lambda: encoder("SequenceClassification", num_labels=4), lambda: random(ROWS, 4, below=2).float(), BCE,
               lambda out, y: F.binary_cross_entropy_with_logits(out.logits, y) + 0.1 * out.logits.square().mean()),
    "numbers": (lambda: encoder("SequenceClassification", num_labels=1), lambda: random(ROWS, below=9).float(), MSE,
                lambda out, y: F.mse_loss(out.logits[:, 0], y)),
    "spans": (lambda: encoder("QuestionAnswering"), lambda: random(ROWS, 2, below=T), OBJECTIVE,
              lambda out, y: (OBJECTIVE(out.start_logits, y[:, 0], backend="reference") +
                              OBJECTIVE(out.end_logits, y[:, 1], backend="reference")) / 2),
}  # fmt: skip


def gradients_of_trainer(
    model: nn.Module, rows: list[dict[str, Tensor]], folder: Any, **options: Any
) -> dict[str, Tensor]:
    """Those of the first step."""
    found: dict[str, Tensor] = {}

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    loss_func = options.pop("compute_loss_func", None)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=1, optim="sgd", learning_rate=1e-3, max_grad_norm=0.0, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no", use_cpu=True, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, compute_loss_func=loss_func, callbacks=[Keep()]
    )
    trainer.train()
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("size", "accumulation"), [(7, 1), (2, 4), (3, 3), (1, 7)])
@pytest.mark.parametrize("head", HEADS)
def test_trainer_is_exact_under_accumulation(head: str, size: int, accumulation: int, tmp_path: Any) -> None:
    """24: one step of several batches, the last one smaller, with other masks, is one of all rows, for every head."""
    make, labels_of, objective, formula = HEADS[head]
    torch.manual_seed(0)
    model, labels, ids = make().train(), labels_of(), random(ROWS, T)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = random(ROWS, T, below=V - 3)
    truth = gradients(model, formula(model(**inputs), labels))
    rows = [{name: value[k] for name, value in {**inputs, "labels": labels}.items()} for k in range(ROWS)]
    found = gradients_of_trainer(
        model, rows, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        compute_loss_func=compute_loss_func(objective), remove_unused_columns=head != "spans",
    )  # fmt: skip
    assert found.keys() == truth.keys()
    for key, gradient in truth.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "t5", "bart, bias"])
@pytest.mark.parametrize(("size", "accumulation"), [(7, 1), (2, 4)])
def test_trainer_with_an_attached_model(size: int, accumulation: int, name: str, tmp_path: Any) -> None:
    """Trainer passes `num_items_in_batch` to the model, and the model to the objective; also models that do not know
    it, and take the mean of each batch."""
    torch.manual_seed(0)
    model, labels, ids = MODELS[name]().train(), masked(random(ROWS, T)), random(ROWS, T)
    truth = gradients(model, by_hand(model, OBJECTIVE, {"input_ids": ids, "labels": labels}))
    attach(model, OBJECTIVE)
    rows = [{"input_ids": ids[k], "labels": labels[k]} for k in range(ROWS)]
    found = gradients_of_trainer(
        model, rows, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    for key, gradient in truth.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-9)


def losses_of_trainer(head: str, how: str, folder: Any) -> list[float]:
    """Of 50 steps of AdamW."""
    make, labels_of, objective, _ = HEADS[head]
    torch.manual_seed(0)
    model, labels, ids = make(), labels_of(), random(ROWS, T)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = random(ROWS, T, below=V - 3)
    rows = [{name: value[k] for name, value in {**inputs, "labels": labels}.items()} for k in range(ROWS)]
    found: list[float] = []
    compute = compute_loss_func(objective, backend="reference" if how == "native" else "auto")

    def loss_func(*arguments: Any, **options: Any) -> Tensor:
        loss = compute(*arguments, **options)
        found.append(loss.item())
        return loss

    class Keep(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if how == "attached":
                found.append(parts(model)["total"].item())

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=50, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], seed=0,
        save_strategy="no", disable_tqdm=True, logging_strategy="no", use_cpu=True,
        remove_unused_columns=head != "spans",
    )  # fmt: skip
    if how == "attached":
        attach(model, objective)
    transformers.Trainer(
        model, arguments, train_dataset=rows, compute_loss_func=None if how == "attached" else loss_func,
        callbacks=[Keep()],
    ).train()  # fmt: skip
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", HEADS)
def test_fused_and_native_curves_are_the_same(head: str, tmp_path: Any) -> None:
    native = losses_of_trainer(head, "native", tmp_path)
    assert len(native) == 50
    assert sum(native[-10:]) < sum(native[:10])
    for how in ("fused", *(["attached"] if head in ("causal", "seq2seq") else [])):
        assert losses_of_trainer(head, how, tmp_path) == pytest.approx(native, rel=1e-4), how


def test_labels_that_do_not_fit() -> None:
    compute = compute_loss_func(OBJECTIVE)
    logits = torch.randn(2, 3)
    with pytest.raises(TypeError, match="expected logits"):
        compute({"hidden": logits}, torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match="labels: expected a tensor"):
        compute({"logits": logits}, None)
    with pytest.raises(ValueError, match="expected one for each of"):
        compute_loss_func(MSE)({"logits": logits}, torch.zeros(2))
    with pytest.raises(ValueError, match="expected one for each of"):
        compute_loss_func(MSE)({"logits": logits}, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="shift them, and pass shift=False"):
        compute_loss_func(CrossEntropy(), shift=True)({"logits": logits}, torch.ones(2, 3))
    column = compute_loss_func(MSE)({"logits": logits[:, :1]}, torch.ones(2))
    torch.testing.assert_close(column, F.mse_loss(logits[:, 0], torch.ones(2)))
    with pytest.raises(TypeError, match="start and end positions"):
        compute({"start_logits": logits, "end_logits": logits}, torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match=r"expected an objkern\.Objective"):
        compute_loss_func(F.cross_entropy)


def test_terms_on_parameters_count_by_the_share_of_a_batch() -> None:
    p, logits, labels = torch.tensor([2.0]), torch.randn(3, 5), torch.tensor([1, -100, 4])
    found = compute_loss_func(CrossEntropy() + objkern.L2([p]))({"logits": logits}, labels, num_items_in_batch=8)
    expected = F.cross_entropy(logits, labels, reduction="sum") / 8 + 2.0 * 2 / 8
    torch.testing.assert_close(found, expected)


def test_places_that_truncation_cut_off_count_for_nothing() -> None:
    start, end = torch.randn(3, 5), torch.randn(3, 5)
    spans = torch.tensor([[1, 2], [0, 9], [-100, 4]])
    expected = (F.cross_entropy(start[:2], spans[:2, 0]) + F.cross_entropy(end[[0, 2]], spans[[0, 2], 1])) / 2
    pair = spans.unbind(1)
    for labels in (spans, pair, dict(zip(("start_positions", "end_positions"), pair, strict=True))):
        found = compute_loss_func(CrossEntropy())({"start_logits": start, "end_logits": end}, labels)
        torch.testing.assert_close(found, expected)
