"""slime: its contract, what its custom loss and hooks are given and call, with its real shapes."""

import json
import sys
import warnings
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from support.trainers import CLIP, NAN, formula
from torch.utils.checkpoint import checkpoint

# Names by which --custom-...-path finds functions here, in the place of an import.
FUNCTIONS = {}


def slime_loss():
    """What slime's megatron_utils.loss gives: log-probs of the labels, one token before each."""

    def get_log_probs_and_entropy(
        logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy=False,
        top_p_token_ids=None, top_p_token_offsets=None,
    ):  # fmt: skip
        assert logits.dtype == torch.float32 and logits.dim() == 3 and logits.shape[0] == 1
        x = logits[0].double() / args.rollout_temperature
        result, end = {"log_probs": [], "entropy": []}, 0
        for i, (tokens, total, response) in enumerate(
            zip(unconcat_tokens, total_lengths, response_lengths, strict=True)
        ):
            end += total
            rows = x[end - response - 1 : end - 1]
            labels, log_p = tokens[-response:, None], rows.log_softmax(-1)
            result["entropy"].append(-(log_p.exp() * log_p).sum(-1))
            if top_p_token_ids is not None:
                sets = top_p_token_ids[i].tensor_split(top_p_token_offsets[i][1:-1])
                kept = torch.zeros_like(rows, dtype=torch.bool).scatter(1, labels, True)
                for row, ids in zip(kept, sets, strict=True):
                    row[ids] = True
                log_p = rows.masked_fill(~kept, -torch.inf).log_softmax(-1)
            result["log_probs"].append(log_p.gather(-1, labels)[:, 0])
        return torch.empty(0), result

    def get_rollout_top_p_logprob_kwargs(args, batch):
        if args.rollout_top_p == 1.0:
            return {}
        return {n: batch["rollout_" + n] for n in ("top_p_token_ids", "top_p_token_offsets")}

    def compute_approx_kl(log_probs, log_probs_base, kl_loss_type, importance_ratio=None):
        r = log_probs - log_probs_base
        kl = {"k1": r, "k2": r**2 / 2}.get(kl_loss_type, (-r).exp() - 1 + r)
        kl = kl if importance_ratio is None else importance_ratio * kl
        return kl.clamp(-10, 10) if kl_loss_type == "low_var_kl" else kl

    def vanilla_tis_function(
        args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kwargs
    ):
        tis = (torch.cat(train_log_probs) - torch.cat(rollout_log_probs)).exp()
        weights = tis.clamp(args.tis_clip_low, args.tis_clip)
        return pg_loss * weights, loss_masks, {"tis": tis, "tis_abs": (tis - 1).abs()}

    return {
        "compute_approx_kl": compute_approx_kl,
        "get_log_probs_and_entropy": get_log_probs_and_entropy,
        "get_rollout_top_p_logprob_kwargs": get_rollout_top_p_logprob_kwargs,
        "vanilla_tis_function": vanilla_tis_function,
    }


@pytest.fixture
def slime(stand_in, monkeypatch):
    """A function that gives the adapter as a new process has it, over stand-ins."""

    def install(loss=None, cp_slice=lambda x, total, response: x):
        for name in ("hook", "slime"):
            monkeypatch.delitem(sys.modules, f"r2vpo_kernels.integrations.{name}", raising=False)
        return stand_in(
            "slime",
            megatron__core={
                "mpu": SimpleNamespace(is_pipeline_last_stage=lambda ignore_virtual=False: True)
            },
            slime__backends__megatron_utils__loss=loss or slime_loss(),
            slime__backends__megatron_utils__cp_utils={"slice_log_prob_with_cp": cp_slice},
            slime__utils__misc={"load_function": FUNCTIONS.__getitem__},
        )

    return install


class Case:
    """A micro-batch: one rollout made the first two samples, so that they share a denominator."""

    def __init__(self, **arguments):
        g = torch.Generator().manual_seed(1)
        totals, lengths = [6, 7, 4], [3, 4, 2]
        tokens = [torch.randint(0, 11, (n,), generator=g) for n in totals]
        self.logits = torch.randn(1, sum(totals), 11, generator=g).requires_grad_()
        self._scored = None, None
        masks = [torch.tensor(m, dtype=torch.int32) for m in ([1, 1, 0], [1, 0, 1, 1], [1, 1])]
        holes = [torch.where(m == 1, 0.0, NAN).double() for m in masks]

        def per_token(scale=1.0, shift=0.0):
            drawn = [torch.randn(n, generator=g, dtype=torch.float64) for n in lengths]
            return [scale * x + shift + h for x, h in zip(drawn, holes, strict=True)]

        self.batch = {
            "unconcat_tokens": tokens,
            "total_lengths": totals,
            "response_lengths": lengths,
            "loss_masks": masks,
            "rollout_mask_sums": [torch.tensor(5.0), torch.tensor(5.0), torch.tensor(2.0)],
            "advantages": per_token(),
            "log_probs": per_token(0.3, -2.5),
            "rollout_log_probs": per_token(0.3, -2.5),
            "ref_log_probs": per_token(0.3, -2.5),
        }
        self.args = Namespace(**{
            "rollout_temperature": 0.7, "rollout_top_p": 1.0, "use_rollout_logprobs": False,
            "entropy_coef": 0.0, "use_kl_loss": False, "kl_loss_coef": 0.05, "kl_loss_type": "k1",
            "use_unbiased_kl": False, "use_opsm": False, "use_tis": False, "tis_clip": 1.5,
            "tis_clip_low": 0.7, "get_mismatch_metrics": False, "custom_tis_function_path": None,
            "custom_pg_loss_reducer_function_path": None, "advantage_estimator": "grpo",
            "calculate_per_token_loss": False, "context_parallel_size": 1,
            "loss_type": "custom_loss", "finetune": False, "load": None, "save": None,
            "save_interval": None, "r2vpo_variance_coef": 1.5,
        } | arguments)  # fmt: skip

    def sum_of_sample_mean(self, x):
        """slime's reducer."""
        parts = x.split(self.batch["response_lengths"])
        parts = zip(parts, self.batch["loss_masks"], self.batch["rollout_mask_sums"], strict=True)
        by_token = self.args.calculate_per_token_loss
        return sum((x * m).sum() / (1 if by_token else d.clamp(min=1)) for x, m, d in parts)

    def scored(self):
        """Log-probs and entropy as slime has them: of the same logits, one graph."""
        if self._scored[0] != self.logits._version:
            self._scored = self.logits._version, self._score()
        return self._scored[1]

    def _score(self):
        names = ("unconcat_tokens", "total_lengths", "response_lengths")
        module = slime_loss()
        samples = {n: self.batch[n] for n in names}
        samples |= module["get_rollout_top_p_logprob_kwargs"](self.args, self.batch)
        return module["get_log_probs_and_entropy"](self.logits, args=self.args, **samples)[1]

    def packed(self, name):
        return torch.cat(self.batch[name])

    def __call__(self, adapter):
        return adapter.r2vpo_loss_function(
            self.args, self.batch, self.logits, self.sum_of_sample_mean
        )

    def mean(self, terms):
        """By slime's denominators."""
        parts = terms.split(self.batch["response_lengths"])
        sums = self.batch["rollout_mask_sums"]
        return sum(x.nan_to_num().sum() / d for x, d in zip(parts, sums, strict=True))

    def terms(self, mask=None, old="log_probs", **options):
        mask = self.packed("loss_masks") == 1 if mask is None else mask
        columns = torch.cat(self.scored()["log_probs"]), self.packed(old), self.packed("advantages")
        options = {"coef": 1.5} | options
        return formula(*(x[None] for x in columns), mask[None], **options)[0]

    def assert_same(self, loss, expected):
        (gradient,) = torch.autograd.grad(loss, self.logits, retain_graph=True)
        (truth,) = torch.autograd.grad(expected, self.logits, retain_graph=True)
        assert truth.abs().max() > 1e-3
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
        # The gradient reaches logits in float32, by one rounding at the end.
        torch.testing.assert_close(gradient, truth, rtol=2**-23, atol=1e-12)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kl", [None, "k1", "k2", "k3", "low_var_kl"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_slime(slime, level, kl, unbiased):
    case = Case(
        r2vpo_ratio_level=level, use_unbiased_kl=unbiased, use_kl_loss=kl is not None,
        kl_loss_type=kl or "k1", entropy_coef=0.02, use_rollout_logprobs=level == "sequence",
    )  # fmt: skip
    case.batch["ref_log_probs"][1][2] = 1.5  # where k3 is above 10
    loss, logged = case(slime())
    scored, anchor = case.scored(), "rollout_log_probs" if level == "sequence" else "log_probs"
    expected, kl_loss = 0.0, 0.0
    for i, m in enumerate(case.batch["loss_masks"]):
        m, logps, old = m == 1, scored["log_probs"][i], case.batch[anchor][i]
        terms = formula(logps[None], old[None], case.batch["advantages"][i][None], m[None],
                        coef=1.5, level=level)[0]  # fmt: skip
        terms = terms - 0.02 * torch.where(m, scored["entropy"][i], 0.0)
        if kl:
            r = torch.where(m, logps, 0.0) - torch.where(m, case.batch["ref_log_probs"][i], 0.0)
            three = (-r).exp() - 1 + r
            each = {"k1": r, "k2": r**2 / 2, "k3": three, "low_var_kl": three}[kl]
            if unbiased:
                each = each * torch.where(m, logps - old, 0.0).exp()
            each = each.clamp(-10, 10) if kl == "low_var_kl" else each
            terms = terms + 0.05 * each
            kl_loss = kl_loss + each.sum() / case.batch["rollout_mask_sums"][i]
        expected = expected + terms.sum() / case.batch["rollout_mask_sums"][i]
    case.assert_same(loss, expected)
    assert all(x.dim() == 0 and x.isfinite() and not x.requires_grad for x in logged.values())
    if kl:
        torch.testing.assert_close(logged["kl_loss"], kl_loss.detach(), rtol=0, atol=1e-12)


def test_slimes_names_of_metrics(slime):
    case = Case(entropy_coef=0.02)
    _, logged = case(slime())
    logps, entropy = (torch.cat(case.scored()[n]).detach() for n in ("log_probs", "entropy"))
    valid = case.packed("loss_masks") == 1
    old, rollout = case.packed("log_probs"), case.packed("rollout_log_probs")
    expected = {
        "pg_loss": case.terms().detach(),
        "entropy_loss": torch.where(valid, entropy, NAN),
        "ppo_kl": old - logps,
        "train_rollout_logprob_abs_diff": (old - rollout).abs(),
        "pg_clipfrac": torch.zeros(9),
    }
    expected = {name: case.mean(x) for name, x in expected.items()}
    expected["loss"] = expected["pg_loss"] - 0.02 * expected["entropy_loss"]
    for name, value in expected.items():
        torch.testing.assert_close(logged[name].double(), value.double(), rtol=0, atol=1e-12)
    assert {"ratio/mean", "ratio/second_moment", "step/ratio_var"} <= set(logged)
    assert "kl_loss" not in logged and "ois" not in logged


def test_the_anchor_of_slime_is_that_of_the_engine(slime):
    """Its log-probs too are then compared with the engine's as they are now."""
    case = Case(use_rollout_logprobs=True)
    del case.batch["log_probs"]  # slime does not recompute them
    loss, logged = case(slime())
    case.assert_same(loss, case.mean(case.terms(old="rollout_log_probs")))
    difference = torch.cat(case.scored()["log_probs"]) - case.packed("rollout_log_probs")
    torch.testing.assert_close(
        logged["train_rollout_logprob_abs_diff"], case.mean(difference.abs()).detach()
    )


def drop_by_mask(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kwargs):
    """Rejection: masks of whole responses."""
    ratio = [(a - b).exp() for a, b in zip(train_log_probs, rollout_log_probs, strict=True)]
    masks = [m * (x < 1.2) for m, x in zip(loss_masks, ratio, strict=True)]
    return pg_loss * torch.cat(ratio), masks, {"mis_ratio": torch.cat(ratio)}


def drop_by_weight(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, **kwargs):
    """As slime's icepop_function."""
    ratio = (torch.cat(train_log_probs) - torch.cat(rollout_log_probs)).exp()
    return pg_loss * torch.where(ratio < 1.2, ratio, 0.0), loss_masks, {"mis_ratio": ratio}


@pytest.mark.parametrize("correct", [None, drop_by_mask, drop_by_weight])
def test_with_the_engines_anchor_a_correction_gives_metrics_alone(slime, monkeypatch, correct):
    """The ratio corrects already."""
    monkeypatch.setitem(FUNCTIONS, "a.path", correct)
    case = Case(custom_tis_function_path=correct and "a.path", use_rollout_logprobs=True)
    case.args.get_mismatch_metrics = True
    loss, logged = case(slime())
    case.assert_same(loss, case.mean(case.terms(old="rollout_log_probs")))
    assert {"ois", "tis" if correct is None else "mis_ratio"} <= set(logged)


def test_slime_clips(slime):
    """Without a penalty, unless one is set."""
    options = {f"r2vpo_{name}": value for name, value in CLIP.items()}
    case = Case(calculate_per_token_loss=True, **options)
    del case.args.r2vpo_variance_coef
    loss, logged = case(slime())
    case.assert_same(loss, case.terms(coef=0.0, clip=CLIP["clip_range"]).sum())
    ratio = (torch.cat(case.scored()["log_probs"]) - case.packed("log_probs")).exp()
    above = case.packed("advantages") > 0
    clipped = (above & (ratio > 1.2)) | (~above & (ratio < 0.9)) & (ratio == ratio)
    assert clipped.any()
    torch.testing.assert_close(logged["pg_clipfrac"], clipped.sum().double())


@pytest.mark.parametrize("option", ["use_tis", "get_mismatch_metrics"])
@pytest.mark.parametrize("correct", [None, drop_by_mask, drop_by_weight])
def test_tis_weighs_advantages_and_drops_the_penalty(slime, monkeypatch, correct, option):
    monkeypatch.setitem(FUNCTIONS, "a.path", correct)
    case = Case(custom_tis_function_path=correct and "a.path", entropy_coef=0.02, use_kl_loss=True)
    setattr(case.args, option, True)
    loss, logged = case(slime())
    valid = case.packed("loss_masks") == 1
    weight = (case.packed("log_probs") - case.packed("rollout_log_probs")).exp()
    trained, kept = valid, valid
    if correct is None:
        capped = weight.clamp(0.7, 1.5)
        assert (capped != weight)[valid].any()
    else:
        capped, trained = weight, valid & (weight < 1.2)
        kept = trained if correct is drop_by_mask else valid
        assert 0 < trained.sum() < valid.sum()
    terms = case.terms(trained, weight=torch.where(trained, capped, 0.0))
    logps, entropy = (torch.cat(case.scored()[n]) for n in ("log_probs", "entropy"))
    pg_loss = case.mean(terms)
    entropy_loss = case.mean(torch.where(kept, entropy, 0.0))
    r = torch.where(kept, logps, 0.0) - torch.where(kept, case.packed("ref_log_probs"), 0.0)
    case.assert_same(loss, pg_loss - 0.02 * entropy_loss + 0.05 * case.mean(r))
    # Of the mismatch over all tokens, of the rest over those that are kept.
    expected = {
        "tis" if correct is None else "mis_ratio": case.mean(weight),
        "ois": case.mean((logps - case.packed("log_probs")).exp()),
        "pg_loss": pg_loss,
        "ppo_kl": case.mean(torch.where(kept, case.packed("log_probs") - logps, 0.0)),
    }
    # That of the two rollouts here; slime divides by their number. The dual sees the same tokens.
    moment = 2 * ((logps - case.packed("log_probs")).exp() - 1)[trained].square().mean()
    expected["ratio/second_moment"] = moment
    for name, value in expected.items():
        torch.testing.assert_close(logged[name].double(), value.detach(), rtol=1e-6, atol=1e-12)


def test_slimes_custom_reducer_divides_the_policy_loss(slime, monkeypatch):
    """Its penalty too, and nothing else, by the masks that a correction leaves."""

    def constant(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
        assert not calculate_per_token_loss and len(total_lengths) == len(response_lengths) == 3
        return lambda x: (x * torch.cat(loss_masks)).sum() / torch.cat(loss_masks).sum()

    monkeypatch.setitem(FUNCTIONS, "reducer", constant)
    monkeypatch.setitem(FUNCTIONS, "correction", drop_by_mask)
    case = Case(custom_pg_loss_reducer_function_path="reducer", entropy_coef=0.02)
    case.args.use_tis, case.args.custom_tis_function_path = True, "correction"
    loss, logged = case(slime())
    weight = (case.packed("log_probs") - case.packed("rollout_log_probs")).exp()
    kept = (case.packed("loss_masks") == 1) & (weight < 1.2)
    entropy = case.mean(torch.where(kept, torch.cat(case.scored()["entropy"]), 0.0))
    pg_loss = case.terms(kept, weight=torch.where(kept, weight, 0.0)).sum() / kept.sum()
    case.assert_same(loss, pg_loss - 0.02 * entropy)
    torch.testing.assert_close(logged["entropy_loss"], entropy.detach())


def test_replayed_sets_renormalise(slime):
    case = Case(rollout_top_p=0.9)
    sets = [torch.arange(2, dtype=torch.int32).repeat(n) + 3 for n in (3, 4, 2)]
    offsets = [torch.arange(0, 2 * n + 1, 2) for n in (3, 4, 2)]
    case.batch |= {"rollout_top_p_token_ids": sets, "rollout_top_p_token_offsets": offsets}
    loss, _ = case(slime())
    case.assert_same(loss, case.mean(case.terms()))
    unfiltered = Case()
    assert (loss - unfiltered.mean(unfiltered.terms())).abs() > 0.1


def reduced(logged, divisor):
    """As slime reduces metrics: summed over micro-batches and ranks, then divided."""
    return {name: sum(x[name] for x in logged).item() / divisor for name in logged[0]}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("by_token", [False, True])
def test_metrics_that_are_no_means_come_out_as_they_are(slime, by_token, ranks):
    """Though rollouts may be masked throughout, share denominators, and lie on several ranks."""
    case = Case(
        calculate_per_token_loss=by_token, context_parallel_size=ranks, r2vpo_variance_target=0.02
    )
    adapter = slime()
    masked = Case(**vars(case.args))
    masked.batch["loss_masks"] = [torch.zeros_like(m) for m in masked.batch["loss_masks"]]
    masked.batch["rollout_mask_sums"] = [torch.tensor(0.0)] * 3
    logged = [case(adapter)[1], masked(adapter)[1]] * ranks
    steps = adapter.steps_of(case.args)
    # Context-parallel ranks each count all tokens, and slime corrects that.
    divisor = 7 + 3 if by_token else 2 + 3
    values = reduced(logged, divisor)
    for name, value in steps.metrics().items():
        assert values[name] == pytest.approx(value.item(), rel=1e-6)
    assert values["variance_coef"] == pytest.approx(1.5, rel=1e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_dual_of_slime_follows_optimizer_steps(slime, recompute):
    """Two micro-batches a step, also where the loss is called again in backward."""
    adapter = slime()
    first, second = Case(r2vpo_variance_target=0.05), Case()
    second.args = first.args
    with torch.no_grad():
        second.logits += torch.randn(second.logits.shape, generator=torch.manual_seed(3))
    parameters = [first.logits, second.logits]
    optimizer, expected = torch.optim.SGD(parameters, lr=0.5), 1.5
    for _ in range(3):
        squares, count = 0.0, 0
        for case in (first, second):
            call = (case.args, case.batch, case.logits, case.sum_of_sample_mean)
            if recompute:
                loss, logged = checkpoint(adapter.r2vpo_loss_function, *call, use_reentrant=False)
            else:
                loss, logged = adapter.r2vpo_loss_function(*call)
            loss.backward()
            share = 2.0  # rollouts in this micro-batch
            assert logged["variance_coef"].item() / share == pytest.approx(expected, rel=1e-6)
            valid = case.packed("loss_masks") == 1
            logps = torch.cat(case.scored()["log_probs"]).detach()
            ratio = (logps - case.packed("log_probs"))[valid].exp()
            squares, count = squares + ((ratio - 1) ** 2).sum().item(), count + len(ratio)
        optimizer.step()
        optimizer.zero_grad()
        violation = torch.tensor(squares / count / 0.05 - 1).clamp(max=1.0)
        expected *= (0.1 * violation).exp().item()
    assert adapter.steps_of(first.args).constraint.coef.item() == pytest.approx(expected, rel=1e-6)


def train(adapter, case, rollout_id, steps=2):
    """A rollout as slime trains on it."""
    optimizer = torch.optim.SGD([case.logits], lr=0.1)
    for step_id in range(steps):
        optimizer.zero_grad()
        adapter.before_train_step(case.args, rollout_id, step_id, [], optimizer, None)
        case(adapter)[0].backward()
        optimizer.step()
    return adapter.steps_of(case.args).constraint.coef.item()


def test_the_coefficient_is_kept_beside_slimes_checkpoints(slime, tmp_path):
    """By rollout, the last included, and read again in a process that goes on from one of them."""
    arguments = {"save": str(tmp_path), "save_interval": 2, "r2vpo_variance_target": 0.05}
    adapter, case = slime(), Case(finetune=True, load="/a/model", **arguments)
    found = [train(adapter, case, rollout_id) for rollout_id in range(3)]
    assert len({1.5, *found}) == 4
    kept = [tmp_path / "r2vpo" / f"variance_coef_{i}.json" for i in range(3)]
    assert [json.loads(file.read_text())["variance_coef"] for file in kept] == found

    def resume(rollout_id, **changes):
        adapter, case = slime(), Case(load=str(tmp_path), **arguments | changes)
        adapter.before_train_step(case.args, rollout_id, 0, [], None, None)
        return adapter, case, adapter.steps_of(case.args).constraint.coef.item()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter, case, coef = resume(2)
        assert coef == found[1]
        assert train(adapter, case, 2) == found[2]
        # The process goes on: nothing is read any more.
        kept[2].write_text('{"variance_coef": 50.0}')
        assert found[2] < train(adapter, case, 3) < 50
        # Neither is it by a run that starts from weights alone.
        assert resume(0)[2] == resume(1, finetune=True)[2] == 1.5
    with pytest.warns(UserWarning, match=r"variance_coef_8\.json does not exist: λ starts anew"):
        assert resume(9)[2] == 1.5
    kept[0].unlink()
    adapter, case, _ = resume(0, save_interval=None)
    train(adapter, case, 0)
    assert not kept[0].exists()


def test_processes_without_the_loss_keep_no_coefficient(slime, tmp_path):
    """A critic's, and those of other pipeline stages."""
    arguments = {"save": str(tmp_path), "load": str(tmp_path), "save_interval": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for changes in ({"loss_type": "value_loss"}, {"r2vpo_variance_target": None}):
            adapter, case = slime(), Case(**arguments | {"r2vpo_variance_target": 0.05} | changes)
            adapter.before_train_step(case.args, 3, 0, [], None, None)
            assert adapter.steps_of(case.args).file is None
        adapter, case = slime(), Case(r2vpo_variance_target=0.05, **arguments)
        adapter.mpu.is_pipeline_last_stage = lambda ignore_virtual: not ignore_virtual
        adapter.before_train_step(case.args, 3, 0, [], None, None)
        assert adapter.steps_of(case.args).file is None


def test_ratios_of_one_are_warned_of(slime):
    adapter, case = slime(), Case()
    optimizer = torch.optim.SGD([case.logits], lr=0.0)
    case.batch["log_probs"] = [x.detach() for x in case.scored()["log_probs"]]
    with pytest.warns(UserWarning, match="exactly 1.*Set --use-rollout-logprobs"):
        for _ in range(4):
            case(adapter)[0].backward()
            optimizer.step()


def test_slime_context_parallel_slices_masks_and_empty_ranks(slime):
    """A rank holds part of each response: its masks are sliced, and it may hold nothing."""
    adapter = slime(cp_slice=lambda x, total, response: x[:1])
    case = Case(context_parallel_size=2)
    columns = ("advantages", "log_probs", "rollout_log_probs", "ref_log_probs")
    whole, whole_batch = adapter.loss.get_log_probs_and_entropy, case.batch

    def hold(keep):
        def get(*a, **k):
            _, scored = whole(*a, **k)
            parts = {name: [x[:keep] for x in xs] for name, xs in scored.items()}
            # As if slime's all-gather left a rank without tokens outside the graph.
            return None, parts if keep else {n: [x.detach() for x in xs] for n, xs in parts.items()}

        adapter.loss.get_log_probs_and_entropy = get
        adapter.cp_utils.slice_log_prob_with_cp = lambda x, total, response: x[:keep]
        case.batch = whole_batch | {n: [x[:keep] for x in whole_batch[n]] for n in columns}
        return adapter.r2vpo_loss_function(case.args, case.batch, case.logits, torch.sum)[0]

    loss, one = hold(1), torch.ones(1, 1, dtype=torch.bool)
    scored = [x[:1] for x in case.scored()["log_probs"]]
    parts = zip(scored, case.batch["log_probs"], case.batch["advantages"], strict=True)
    expected = sum(formula(*(x[None] for x in xs), one, coef=1.5).sum() for xs in parts)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    optimizer, steps = torch.optim.SGD([case.logits], lr=0.1), adapter.steps_of(case.args)
    optimizer.step()

    loss = hold(0)
    (gradient,) = torch.autograd.grad(loss, case.logits)
    assert loss == 0 and (gradient == 0).all()
    # It takes part in the sums over ranks at the step, where others would wait for it.
    before = steps.last
    optimizer.step()
    assert steps.last is not before and steps.last.weight.sum() == 0


def test_slime_bad_input(slime):
    adapter = slime()

    def error(match, drop=None, check=adapter.check_arguments, **changes):
        case = Case(**changes)
        case.batch = {k: v for k, v in case.batch.items() if k != drop}
        with pytest.raises(ValueError, match=match):
            case(adapter)
        if check is not None:
            with pytest.raises(ValueError, match=match):
                check(case.args)

    options = {f"r2vpo_{name}": value for name, value in CLIP.items()}
    adapter.check_arguments(Case(r2vpo_ratio_level="sequence", **options).args)
    adapter.check_arguments(Case(r2vpo_variance_target=0.05).args)
    error("log_probs: got None, expected .*shape", drop="log_probs", check=None)
    error("rollout_log_probs: got None", drop="rollout_log_probs", check=None,
          use_rollout_logprobs=True)  # fmt: skip
    error("rollout_log_probs: got None", drop="rollout_log_probs", check=None, use_tis=True)
    error("ref_log_probs: got None", drop="ref_log_probs", check=None, use_kl_loss=True)
    error("center: got 'group'", r2vpo_center="group")
    error("policy_loss: got 'ppo'", r2vpo_policy_loss="ppo")
    error("r2vpo_variance_target: got -1", r2vpo_variance_target=-1)
    error("r2vpo_variance_coeff: got 1, expected one of r2vpo_policy_loss, .*variance_coef",
          r2vpo_variance_coeff=1)  # fmt: skip
    for estimator in ("gspo", "cispo"):
        error(f"advantage_estimator: got {estimator}", advantage_estimator=estimator)
    error("use_opsm: got True, expected it unset", use_opsm=True)
    error("use_tis: got True, expected it unset with use_rollout_logprobs", use_tis=True,
          use_rollout_logprobs=True)  # fmt: skip
    error("r2vpo_ratio_level: got 'sequence', expected 'token' under context parallelism",
          r2vpo_ratio_level="sequence", context_parallel_size=2)  # fmt: skip
    case = Case(r2vpo_variance_target=0.05, r2vpo_variance_coef_file="/a/file")
    with pytest.raises(ValueError, match="r2vpo_variance_coef_file: got '/a/file', expected it un"):
        adapter.before_train_step(case.args, 0, 0, [], None, None)


def test_what_slime_lacks_is_named(slime):
    without = slime_loss()
    del without["vanilla_tis_function"]
    with pytest.raises(
        ImportError, match=r"slime: got version .*loss without vanilla_tis_function"
    ):
        slime(loss=without)
    older = slime_loss() | {"compute_approx_kl": lambda log_probs, base, kl_loss_type: None}
    with pytest.raises(ImportError, match=r"without the parameter importance_ratio; .* 0\.3\.1"):
        slime(loss=older)
