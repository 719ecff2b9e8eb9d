"""SkyRL: its trainer, dispatch, worker, batches and configuration, from its wheel.

Ray's calls run in threads, one a rank; a model is a table of log-probs.
"""

import importlib
import importlib.metadata
import math
import multiprocessing
import pickle
import sys
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import ray.cloudpickle
import torch
from support.trainers import CLIP, Stubs, case, formula

from r2vpo_kernels import RatioStats, VarianceConstraint

RANKS = 2
ROWS, LENGTH, PROMPT_LENGTH = 7, 6, 2
# The second as with step-wise trajectories: prompts and ranks do not have the same number of rows.
MINI_BATCHES = [(0, 4), (4, 7)]
PROMPTS = [(0, 2), (2, 4), (4, 5), (5, 7)]
MAX_SEQ_LEN = 50
PREFIX = "trainer.algorithm."


STUBS = ("jaxtyping", "loguru", "skyrl.tinker", "skyrl.backends.backend")


@pytest.fixture(scope="module")
def modules():
    """The adapter, its trainers, and SkyRL's modules by their last names."""
    ours = "r2vpo_kernels.integrations."
    names = [
        "train.trainer", "train.utils.utils", "backends.skyrl_train.training_batch",
        "backends.skyrl_train.workers.worker", "backends.skyrl_train.workers.worker_dispatch",
        "backends.skyrl_train.workers.worker_utils", "backends.skyrl_train.distributed.dispatch",
    ]  # fmt: skip
    before, start_method = dict(sys.modules), multiprocessing.get_start_method(allow_none=True)
    for name in [n for n in sys.modules if n.startswith(("skyrl", ours))]:
        del sys.modules[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "meta_path", [Stubs(*STUBS), *sys.meta_path])
        gym = importlib.metadata.distribution("skyrl").locate_file("skyrl-gym")
        patch.syspath_prepend(str(gym))
        found = {n.split(".")[-1]: importlib.import_module("skyrl." + n) for n in names}
        adapter = importlib.import_module(ours + "skyrl")
        ours_by_name = {
            "adapter": adapter,
            "trainers": importlib.import_module(ours + "skyrl.trainer"),
            "hook": importlib.import_module(ours + "hook"),
        }
        yield Namespace(**found, **ours_by_name)
    # SkyRL's main_base sets it for the process.
    multiprocessing.set_start_method(start_method, force=True)
    for name in [n for n in sys.modules if n.startswith(("skyrl", *STUBS, ours))]:
        del sys.modules[name]
    sys.modules.update({n: m for n, m in before.items() if n.startswith(("skyrl", ours))})


@pytest.fixture
def skyrl(modules, monkeypatch):
    """The modules, with ray's calls in threads, and the CPU for a GPU."""
    monkeypatch.setattr("ray.put", lambda value: pickle.loads(pickle.dumps(value)))
    monkeypatch.setattr("ray.get", lambda futures: [f.result(timeout=60) for f in futures])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    modules.hook._steps.clear()
    with ThreadPoolExecutor(RANKS) as pool:
        modules.pool = pool
        yield modules


class Strategy:
    """A rank's strategy: metrics are reduced as SkyRL's is, gradients averaged as by FSDP."""

    def __init__(self, rank, ranks, lr, failing=()):
        self.rank, self.ranks, self.lr, self.failing = rank, ranks, lr, failing
        self.gradients = []

    def reduced(self, value, operation):
        self.ranks.values[self.rank] = value
        self.ranks.barrier.wait()
        result = operation(self.ranks.values)
        self.ranks.barrier.wait()
        return result

    def all_reduce(self, data, op, group):
        assert group == "data parallel"
        operation = {"sum": sum, "min": min, "max": max, "mean": lambda x: sum(x) / RANKS}[op]
        return {name: self.reduced(x, operation) for name, x in data.items()}

    def backward(self, loss, model, optimizer):
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler, name):
        gradient = self.reduced(model.table.grad, lambda values: sum(values) / RANKS)
        model.table.grad = None
        self.gradients.append(gradient)
        if len(self.gradients) - 1 in self.failing:
            return torch.tensor(math.inf)
        model.table.data -= self.lr * gradient
        return gradient.norm()


class Model:
    """Rows of a table by the first token of a sequence."""

    def __init__(self, table):
        self.table = table.detach().clone().requires_grad_()

    def train(self):
        pass

    def __call__(self, sequences, num_actions, **kwargs):
        return self.table[sequences[:, 0] % ROWS], {"entropy": torch.zeros(sequences.shape)}


def configuration(skyrl, *arguments, config=None):
    """By SkyRL's command line and its own checks."""
    config = config or skyrl.trainers.make_config(algorithm_cls=skyrl.adapter.R2VPOAlgorithmConfig)
    basics = (
        "trainer.logger=console", "trainer.train_batch_size=4", "trainer.policy_mini_batch_size=2",
        "generator.n_samples_per_prompt=2", "trainer.micro_train_batch_size_per_gpu=1",
        "trainer.placement.colocate_all=false", "trainer.placement.colocate_policy_ref=false",
        "trainer.placement.policy_num_gpus_per_node=2",
        "trainer.placement.ref_num_gpus_per_node=2", PREFIX + "use_kl_loss=false",
        PREFIX + f"max_seq_len={MAX_SEQ_LEN}",
        "generator.inference_engine.enable_ray_prometheus_stats=false",
    )  # fmt: skip
    cfg = config.from_cli_overrides([*basics, *arguments])
    skyrl.trainers.validate_cfg(cfg)
    return cfg


def trainer_of(skyrl, cfg, table=None, lr=0.0, failing=(), base=None):
    """A trainer whose workers have that model."""
    trainer = (base or skyrl.trainers.R2VPOTrainer)(
        cfg=cfg, tracker=None, tokenizer=None, train_dataset=None, inference_engine_client=None,
        generator=None,
    )  # fmt: skip
    ranks = Namespace(barrier=threading.Barrier(RANKS, timeout=20), values=[None] * RANKS)
    workers, infos = [], []
    sent = ray.cloudpickle.dumps(cfg.trainer)
    for rank in range(RANKS):
        mesh = skyrl.dispatch.MeshRank(rank, 0, 0, 0, RANKS, RANKS, 1)
        worker = object.__new__(skyrl.worker.PolicyWorkerBase)
        vars(worker).update(
            cfg=ray.cloudpickle.loads(sent), mesh_rank=mesh, optimizer=None,
            model=None if table is None else Model(table),
            strategy=Strategy(rank, ranks, lr, failing), scheduler=mock.Mock(),
            device_mesh=Namespace(get_group=lambda name: "data parallel"),
            policy_loss_fn=skyrl.adapter.ppo_utils.PolicyLossRegistry.get("r2vpo"),
            save_memory_snapshot=lambda tag: None,
        )  # fmt: skip
        worker.scheduler.get_last_lr.return_value = [lr]
        workers.append(worker)
        infos.append(skyrl.dispatch.ActorInfo(Handle(worker, skyrl.pool), mesh))
    group = object.__new__(skyrl.worker.PPORayActorGroup)
    group.actor_infos = infos

    def build_models(self):
        self.dispatch = skyrl.worker_dispatch.WorkerDispatch(cfg, group)

    with mock.patch.object(skyrl.trainer.RayPPOTrainer, "build_models", build_models):
        trainer.build_models()
    return trainer, [worker.strategy for worker in workers]


class Handle:
    """Ray's handle of an actor."""

    def __init__(self, worker, pool):
        self.worker, self.pool = worker, pool

    def __getattr__(self, name):
        method = getattr(self.worker, name)
        return Namespace(remote=lambda *args, **kw: self.pool.submit(method, *args, **kw))


def batch(skyrl, old, advantages, mask, rollout):
    sequences = torch.zeros(ROWS, PROMPT_LENGTH + LENGTH, dtype=torch.long)
    sequences[:, 0] = torch.arange(ROWS)
    data = skyrl.training_batch.TrainingInputBatch({
        "sequences": sequences, "attention_mask": torch.ones_like(sequences),
        "response_mask": mask.long(), "loss_mask": mask.double(), "advantages": advantages.clone(),
        "action_log_probs": old, "rollout_logprobs": rollout,
    })  # fmt: skip
    data.metadata = {
        "response_length": LENGTH, "policy_mini_batch_boundaries": MINI_BATCHES,
        "policy_prompt_boundaries": PROMPTS,
    }  # fmt: skip
    return data


def draw(seed=5):
    """SkyRL fills masked tokens with numbers."""
    return [x.detach().nan_to_num() for x in case(ROWS, LENGTH, seed=seed)]


def weights(reduction, mask):
    """Of each token in the sum over its mini-batch."""
    mask = mask.double()
    result = torch.zeros_like(mask)
    for start, end in MINI_BATCHES:
        rows, lengths = end - start, mask[start:end].sum(-1, keepdim=True).clamp(min=1)
        result[start:end] = (
            1
            / {
                "token_mean": mask[start:end].sum(),
                "token_mean_legacy": rows * lengths,  # of micro-batches, each a row
                "sequence_mean": rows * lengths,
                "seq_mean_token_sum_norm": rows * MAX_SEQ_LEN,
                "prompt_mean": math.inf,
            }[reduction]
        )
    if reduction == "prompt_mean":
        for start, end in PROMPTS:
            result[start:end] = 1 / (2 * mask[start:end].sum().clamp(min=1))
    return result


REDUCTIONS = (
    "token_mean", "token_mean_legacy", "sequence_mean", "seq_mean_token_sum_norm", "prompt_mean",
)  # fmt: skip


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_the_workers_sum_to_the_formula(skyrl, reduction, level):
    """Two mini-batches, a row a micro-batch, a row added so that the ranks have as many."""
    logps, old, advantages, mask, rollout = draw()
    cfg = configuration(
        skyrl, PREFIX + "variance_coef=1.5", PREFIX + f"ratio_level={level}",
        PREFIX + f"loss_reduction={reduction}",
    )  # fmt: skip
    trainer, strategies = trainer_of(skyrl, cfg, logps)
    status = trainer._execute_training_step("policy", batch(skyrl, old, advantages, mask, rollout))
    leaf = logps.requires_grad_()
    terms = formula(leaf, old, advantages, mask, coef=1.5, level=level) * weights(reduction, mask)
    losses = [terms[start:end].sum() for start, end in MINI_BATCHES]
    for loss, gradient in zip(losses, strategies[0].gradients, strict=True):
        (expected,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(status["policy_loss"], sum(losses).item() / 2, rtol=0, atol=1e-12)
    assert {"loss_metrics/ratio_min", "loss_metrics/ratio_max"} <= set(status)
    assert not [name for name in status if name.endswith(skyrl.adapter.SUMS)]
    if level == "token":
        last = (logps.detach() - old).exp()[4:][mask[4:]]
        assert status["step/ratio_var"] == pytest.approx(last.var(correction=0).item(), rel=1e-9)


def gradient_of(table, rows, old, advantages, mask, token_weights, **options):
    start, end = rows
    leaf = table.detach().clone().requires_grad_()
    terms = formula(leaf, old, advantages, mask, **options) * token_weights
    return torch.autograd.grad(terms[start:end].sum(), leaf)[0]


@pytest.mark.parametrize("options", [{}, CLIP], ids=["ratio", "clip"])
@pytest.mark.parametrize("anchor", ["old", "rollout"])
def test_defaults_and_anchor(skyrl, anchor, options):
    logps, old, advantages, mask, rollout = draw()
    arguments = [f"{PREFIX}{name}={value}" for name, value in options.items()]
    cfg = configuration(skyrl, PREFIX + f"anchor={anchor}", *arguments)
    trainer, strategies = trainer_of(skyrl, cfg, logps)
    data = batch(skyrl, old, advantages, mask, rollout)
    assert trainer._skip_policy_forward(data) == (anchor == "rollout")
    if anchor == "rollout":
        data["action_log_probs"] = None  # the forward pass that is saved
    trainer._execute_training_step("policy", data)
    for rows, gradient in zip(MINI_BATCHES, strategies[0].gradients, strict=True):
        expected = gradient_of(
            logps, rows, rollout if anchor == "rollout" else old, advantages, mask,
            weights("token_mean", mask), coef=0.0 if options else 0.5,
            clip=options.get("clip_range"),
        )  # fmt: skip
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_normalized_advantages_and_token_batches(skyrl, monkeypatch):
    """Advantages over the batch's deviation; micro-batches that SkyRL adds, masked throughout."""
    logps, old, advantages, mask, rollout = draw()
    iterator = skyrl.worker_utils.TokenBasedBatchIterator
    monkeypatch.setattr(
        iterator, "_sync_num_microbatches", lambda self: len(self._microbatches) + 1
    )
    cfg = configuration(
        skyrl, PREFIX + "advantage_batch_normalize=true", "trainer.max_tokens_per_microbatch=16"
    )
    trainer, strategies = trainer_of(skyrl, cfg, logps)
    status = trainer._execute_training_step("policy", batch(skyrl, old, advantages, mask, rollout))
    assert status["num_padding_microbatches"] == 1
    assert all(math.isfinite(x) for x in status.values())
    centred = advantages - advantages.mean()
    scored = centred / ((centred**2 * mask).sum() / mask.sum()).sqrt()
    for rows, gradient in zip(MINI_BATCHES, strategies[0].gradients, strict=True):
        expected = gradient_of(logps, rows, old, scored, mask, weights("token_mean", mask))
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_off_policy_correction_weights_the_advantage_and_drops_tokens(skyrl):
    logps, old, advantages, mask, rollout = draw()
    correction = PREFIX + "off_policy_correction."
    cfg = configuration(
        skyrl, correction + "tis_ratio_type=token", correction + "token_tis_ratio_clip_high=1.1",
        correction + "token_mask_is_threshold_low=0.8",
        correction + "token_mask_is_threshold_high=1.2",
    )  # fmt: skip
    trainer, strategies = trainer_of(skyrl, cfg, logps)
    trainer._execute_training_step("policy", batch(skyrl, old, advantages, mask, rollout))
    ratio = (old - rollout).exp()
    kept = mask & (ratio >= 0.8) & (ratio <= 1.2)
    assert 0 < kept.sum() < mask.sum()
    for rows, gradient in zip(MINI_BATCHES, strategies[0].gradients, strict=True):
        expected = gradient_of(
            logps, rows, old, advantages, kept, weights("token_mean", mask),
            weight=ratio.clamp(max=1.1),
        )  # fmt: skip
        # SkyRL's ratios are float32: two roundings of terms below 1.
        torch.testing.assert_close(gradient, expected, rtol=0, atol=2**-23)


def test_the_dual_moves_once_per_optimizer_step(skyrl):
    """Four steps, of which one is skipped: its statistics join those of the next."""
    logps, old, advantages, mask, rollout = draw()
    lr, failing = 0.5, {1}
    cfg = configuration(skyrl, PREFIX + "variance_target=0.02", "trainer.update_epochs_per_batch=2")
    assert cfg.trainer.algorithm.variance_coef is None
    trainer, strategies = trainer_of(skyrl, cfg, logps, lr, failing)
    status = trainer._execute_training_step("policy", batch(skyrl, old, advantages, mask, rollout))

    table, dual, window, coefs = logps, VarianceConstraint(0.02), None, []
    for step, rows in enumerate(MINI_BATCHES * 2):
        coef = dual.coef.item()
        expected = gradient_of(
            table, rows, old, advantages, mask, weights("token_mean", mask), coef=coef
        )
        torch.testing.assert_close(strategies[0].gradients[step], expected, rtol=0, atol=1e-12)
        valid = mask[slice(*rows)]
        d = ((table - old).exp() - 1)[slice(*rows)][valid]
        sums = (valid.sum().double(), d.sum(), (d**2).sum())
        stats = RatioStats(*(x.reshape(1) for x in sums))
        window = stats if window is None else window + stats
        if step not in failing:
            dual.step(window)
            window, table = None, table - lr * expected
        coefs.append(dual.coef.item())
    assert len(set(coefs)) == 3
    assert trainer.steps.constraint.coef.item() == pytest.approx(coefs[-1], rel=1e-6)
    assert status["variance_coef"] == cfg.trainer.algorithm.variance_coef
    assert status["variance_coef"] == pytest.approx(coefs[-1], rel=1e-6)


def test_checkpoints_hold_the_dual(skyrl, tmp_path, monkeypatch):
    """SkyRL's own save_checkpoints and load_checkpoints."""
    arguments = (
        PREFIX + "variance_target=0.02", f"trainer.ckpt_path={tmp_path}",
        "trainer.resume_mode=latest", "trainer.ckpt_interval=1",
    )  # fmt: skip
    monkeypatch.setattr(skyrl.trainer.RayPPOTrainer, "_cleanup_old_checkpoints", mock.Mock())
    for name in ("save_checkpoint", "load_checkpoint"):
        monkeypatch.setattr(skyrl.worker_dispatch.WorkerDispatch, name, mock.Mock())

    def new():
        skyrl.hook._steps.clear()
        trainer, _ = trainer_of(skyrl, configuration(skyrl, *arguments), logps)
        trainer.train_dataloader = mock.Mock(state_dict=dict)
        return trainer

    logps, *rest = draw()
    assert new().load_checkpoints() == (0, None)
    trained = new()
    trained._execute_training_step("policy", batch(skyrl, *rest))
    coef = trained.steps.constraint.coef.item()
    assert coef != 0.5
    trained.global_step = 1
    trained.save_checkpoints()
    resumed = new()
    assert resumed.steps.constraint.coef.item() == 0.5
    assert resumed.load_checkpoints()[0] == 1
    assert resumed.steps.constraint.coef.item() == coef
    assert resumed.algorithm.variance_coef == coef


def test_the_fully_asynchronous_trainer(skyrl, monkeypatch):
    logps, old, advantages, mask, rollout = draw()
    base = skyrl.trainers.FullyAsyncR2VPOTrainer
    loader = mock.MagicMock(state_dict=dict)
    build = "_build_train_dataloader_and_compute_training_steps"
    monkeypatch.setattr(base, build, lambda self: setattr(self, "train_dataloader", loader))
    cfg = configuration(
        skyrl, PREFIX + "anchor=rollout", "trainer.fully_async.enabled=true",
        "trainer.fully_async.num_parallel_generation_workers=4", "trainer.train_batch_size=4",
        "trainer.policy_mini_batch_size=4", "generator.batched=false",
    )  # fmt: skip
    trainer, strategies = trainer_of(skyrl, cfg, logps, base=base)
    data = batch(skyrl, old, advantages, mask, rollout)
    trainer.train_critic_and_policy(data)
    assert trainer.all_metrics["policy/step/ratio_var"] > 0
    for rows, gradient in zip(MINI_BATCHES, strategies[0].gradients, strict=True):
        expected = gradient_of(logps, rows, rollout, advantages, mask, weights("token_mean", mask))
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_a_penalty_without_effect_warns(skyrl):
    logps, _, advantages, mask, rollout = draw()
    cfg = configuration(skyrl, "trainer.update_epochs_per_batch=2")
    trainer, _ = trainer_of(skyrl, cfg, logps)
    with pytest.warns(UserWarning, match=r"no effect. Set trainer.algorithm.anchor=rollout"):
        trainer._execute_training_step("policy", batch(skyrl, logps, advantages, mask, rollout))


def test_the_critic_is_left_alone(skyrl):
    trainer, _ = trainer_of(skyrl, configuration(skyrl))
    dispatch = trainer.dispatch._dispatch = mock.Mock()
    trainer.dispatch.forward_backward_from_staged("critic", ["chunk"])
    trainer.dispatch.optim_step("critic")
    trainer.dispatch.empty_cache("ref")
    dispatch.forward_backward_from_staged.assert_called_once_with("critic", ["chunk"])
    dispatch.empty_cache.assert_called_once_with("ref")


def test_main(skyrl, monkeypatch):
    """By SkyRL's own main(), up to where Ray starts."""
    main_base = sys.modules["skyrl.train.entrypoints.main_base"]
    started = []
    monkeypatch.setattr(skyrl.trainers, "initialize_ray", started.append)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda f: Namespace(remote=started.append))
    monkeypatch.setattr(ray, "get", lambda x: x)
    override = "trainer.override_entrypoint=r2vpo_kernels.integrations.skyrl"

    def main(*arguments):
        started.clear()
        basics = ("trainer.logger=console", "generator.inference_engine.num_engines=4")
        placement = "trainer.placement.policy_num_gpus_per_node=4"
        quiet = "generator.inference_engine.enable_ray_prometheus_stats=false"
        monkeypatch.setattr(sys, "argv", ["main", override, *basics, placement, quiet, *arguments])
        main_base.main()
        return started[0]

    cfg = main(PREFIX + "variance_coef=2.0")
    assert isinstance(cfg.trainer.algorithm, skyrl.adapter.R2VPOAlgorithmConfig)
    assert cfg.trainer.algorithm.variance_coef == 2.0 and started == [cfg, cfg]

    def error(match, *arguments):
        with pytest.raises(ValueError, match=match):
            main(*arguments)
        assert not started

    error("anchor: got 'new', expected one of 'old', 'rollout'", PREFIX + "anchor=new")
    error("center: got 'group'", PREFIX + "center=group")
    error("policy_loss: got 'ppo'", PREFIX + "policy_loss=ppo")
    error("clip_range", PREFIX + "policy_loss=clip")
    error("policy_loss_type: got 'gspo', expected one of 'r2vpo'", PREFIX + "policy_loss_type=gspo")
    error(
        "variance_coef_min: got 0", PREFIX + "variance_target=0.02", PREFIX + "variance_coef_min=0"
    )
    rollout = PREFIX + "anchor=rollout"
    error("generator.sampling_params.logprobs: got None", rollout,
          "generator.sampling_params.logprobs=null")  # fmt: skip
    error("off_policy_correction: got .*corrects already", rollout,
          PREFIX + "off_policy_correction.tis_ratio_type=token",
          PREFIX + "off_policy_correction.token_tis_ratio_clip_high=2.0")  # fmt: skip
    error("anchor: got 'old', expected 'rollout' with trainer.fully_async",
          "trainer.fully_async.enabled=true")  # fmt: skip
    error("Invalid fields {'mini_batch_size'}", PREFIX + "mini_batch_size=8")


def test_the_experiment_has_our_trainers(skyrl, monkeypatch):
    for name in ("R2VPOTrainer", "FullyAsyncR2VPOTrainer"):
        monkeypatch.setattr(skyrl.trainers, name, lambda cfg, name=name: name)
    experiment = object.__new__(skyrl.trainers.R2VPOExp)
    experiment.cfg = configuration(skyrl)
    assert experiment.get_trainer(cfg=None) == "R2VPOTrainer"
    experiment.cfg.trainer.fully_async.enabled = True
    assert experiment.get_trainer(cfg=None) == "FullyAsyncR2VPOTrainer"


def test_an_unmet_need_is_named(skyrl, monkeypatch):
    dispatch = skyrl.worker_dispatch.WorkerDispatch
    monkeypatch.setattr(dispatch, "forward_backward_from_staged", lambda self, model: None)
    found = r"skyrl: got version 0.3.0, .* without the parameter loss_fn_config; .*tested with"
    with pytest.raises(ImportError, match=found):
        importlib.reload(skyrl.trainers)


def test_what_only_a_run_shows(skyrl):
    logps, old, advantages, mask, _ = draw()
    loss = skyrl.adapter.r2vpo_policy_loss
    weighted = advantages.to(torch.complex128)

    def error(match, old=old, advantages=weighted, **changes):
        config = skyrl.adapter.R2VPOAlgorithmConfig(**changes)
        with pytest.raises(ValueError, match=match):
            loss(logps, old, advantages, config, mask)

    error("advantages: got .*expected complex ones.*R2VPOTrainer", advantages=advantages)
    error("old_log_probs: got None", old=None)
    error("rollout_logprobs: got None", anchor="rollout")
    cfg = configuration(skyrl, config=skyrl.trainers.make_config())
    with pytest.raises(ValueError, match=r"trainer.algorithm: got AlgorithmConfig, expected R2VPO"):
        trainer_of(skyrl, cfg)
