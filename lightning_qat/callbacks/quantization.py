"""Quantization-aware training for any LightningModule, by adding a callback to the Trainer."""

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_qat.callbacks.arming import Arming
from lightning_qat.callbacks.neighbours import check_neighbours, check_package
from lightning_qat.callbacks.precision import warn_lost_updates
from lightning_qat.callbacks.random_state import RandomState
from lightning_qat.callbacks.reach import ReachProbe
from lightning_qat.callbacks.reuse import WeightReuse
from lightning_qat.callbacks.strategies import adapter_of
from lightning_qat.callbacks.unfinished import refuse_unfinished_schedules
from lightning_qat.modules import InsertionReport, insert_quantizers, named_quantizers, use_int8_forward
from lightning_qat.modules.compiled import is_compiled
from lightning_qat.modules.insertion import REACHED_ATTRIBUTE
from lightning_qat.modules.layer import quant_layers
from lightning_qat.modules.packed import packed_weights
from lightning_qat.modules.weights import WEIGHT_DTYPES, set_weight_dtypes, weight_dtypes
from lightning_qat.quantizers.running_range import merge_ranges
from lightning_qat.scheme import QuantScheme, differences
from lightning_qat.twin import warn_of_twin

STATE_VERSION = 1
ROOT = "quantization_root"  # where a checkpoint keeps the name below which its quantizers are, None for the module itself


class QuantizationCallback(Callback):
    """Puts fake quantizers into the model before its weights load, before it is wrapped and before optimizers are made.

    The model below ``pl_module.quantization_root`` (a dotted name) is quantized if the module names one, else the whole module. The
    callback never touches the module's ``forward`` and never converts anything at the end of training; use
    :func:`lightning_qat.export` for that. It works in fit, validate, test and predict, and finds its own work when called again.

    Note:
        Checkpoints hold the float weights under their own names. A Trainer without this callback, or ``load_from_checkpoint`` of a module
        other than :class:`~lightning_qat.DistillationModule`, gives the float model; :func:`lightning_qat.load_trained` gives the quantized
        one.

        One for a Trainer: a scheme describes weights, inputs, keys and values together, so give the first what a second would hold.

        A module that shards inside ``configure_model`` (FSDP2) calls ``self.after_build()`` between building and sharding.

    Example::

        Trainer(callbacks=[QuantizationCallback("w8a8")]).fit(my_module, my_data)

    Args:
        scheme: A :class:`~lightning_qat.QuantScheme`, a scheme string such as ``w4a8kv4``, or a preset's name.
        allow_partial: Accept that less than 90 % of the matrix weights in reach of the scheme can be quantized.
        int8_forward: Compute the forward product of linear layers on integer codes, where weights (per output channel) and inputs (per
            token) are both quantized symmetrically and the machine multiplies int8 faster. It is the same product, without the rounding
            of operands that a bf16 product has.
        target: Registered name of the runtime that is trained for, such as ``compressed-tensors`` or ``gguf``: the scheme gets the
            conventions that this runtime executes exactly (:meth:`QuantScheme.parse <lightning_qat.QuantScheme.parse>`).

    Raises:
        ValueError: Unknown scheme, or one that the target cannot execute.
    """

    def __init__(
        self, scheme: str | QuantScheme, allow_partial: bool = False, int8_forward: bool = False, target: str | None = None
    ) -> None:
        warn_of_twin()
        self.scheme = QuantScheme.parse(scheme, target=target)
        self.allow_partial = allow_partial
        self.int8_forward = int8_forward
        self.report: InsertionReport | None = None
        self._inserted_early = 0
        self._arming: Arming | None = None
        self._probe: ReachProbe | None = None
        self._reuse = WeightReuse()
        self._random = RandomState()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Arm; quantizers are inserted when Lightning calls ``configure_model``."""
        check_neighbours(trainer, pl_module, self)
        self._arming = Arming(pl_module, early=lambda: self._insert(pl_module, final=False), late=lambda: self._insert(pl_module))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing behind but the quantizers."""
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave nothing behind but the quantizers; where the cause is a mix of packages, say so, because Lightning's error does not."""
        self._release()
        check_package(trainer, pl_module)

    def _release(self) -> None:
        if self._arming is not None:
            self._arming.disarm()
        if self._probe is not None:
            self._probe.remove()
        self._arming = self._probe = None
        self._reuse.stop()
        self._random.forget()

    def _insert(self, pl_module: pl.LightningModule, final: bool = True) -> None:
        try:
            root = quantization_root(pl_module)
        except AttributeError:
            if final:
                raise
            return  # the root is built in configure_model
        report = insert_quantizers(root, self.scheme, final=False)
        inserted = report.inserted
        if final:
            sharded = [item.name for item in report.left_alone if item.reason.startswith("already sharded")]
            if sharded:
                raise MisconfigurationException(
                    f"{sharded[0]} was sharded before quantizers could be inserted. Add this line to configure_model of "
                    f"{type(pl_module).__name__}, between building and fully_shard:\n"
                    '    if hasattr(self, "after_build"): self.after_build()'
                )
            report = insert_quantizers(root, self.scheme, allow_partial=self.allow_partial)
            if inserted or self._inserted_early:
                rank_zero_info(str(report))
            self.report = replace(report, inserted=inserted + self._inserted_early)
            if self.int8_forward:
                self._use_int8(root)
        self._inserted_early = 0 if final else self._inserted_early + inserted

    def _use_int8(self, root: nn.Module) -> None:
        refused = use_int8_forward(root)
        if len(refused) == sum(1 for _ in quant_layers(root)):
            name, reason = next(iter(refused.items()))
            raise MisconfigurationException(
                f"int8_forward: no layer of this model can compute on integer codes; {name}: {reason}. Use a scheme such as 'w8a8' or "
                "'w4a8', or int8_forward=False"
            )
        if refused:
            rank_zero_info(f"int8_forward: {len(refused)} layers compute in floating point: {sorted(set(refused.values()))}")

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Every parameter that quantizers brought must be trained by some optimizer."""
        root, adapter = quantization_root(pl_module), adapter_of(trainer.strategy)
        adapter.check(trainer, root)
        if packed := packed_weights(root):
            raise MisconfigurationException(
                f"{packed[0]} holds packed codes of an export, which have no gradient; to train on from an export, load it with "
                "load_quantized(path, trainable=True)"
            )
        if (held := adapter.optimized(trainer)) is not None:
            self._check_optimizers(root, held)
        warn_lost_updates(trainer, root)
        if trainer.accumulate_grad_batches > 1:
            self._reuse.start(trainer, root, training=True)
        self._random.restore(trainer)

    @staticmethod
    def _check_optimizers(root: nn.Module, held: set[int]) -> None:
        ours = {id(p): name for name, q in named_quantizers(root) for p in q.parameters() if p.requires_grad}
        lost = [name for key, name in ours.items() if key not in held]
        if lost:
            raise MisconfigurationException(
                f"{len(lost)} parameters of quantizers are held by no optimizer, the first is {lost[0]!r}: the optimizer was built before "
                "they were inserted. Build it in configure_optimizers; with LightningCLI pass auto_configure_optimizers=False and take "
                "`optimizer: OptimizerCallable` in your module"
            )
        idle = [name for name, p in root.named_parameters() if p.requires_grad and id(p) not in held and id(p) not in ours]
        if idle:
            rank_zero_warn(f"{len(idle)} parameters of the quantized model are held by no optimizer, the first is {idle[0]!r}")

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Weights may change without an optimizer from here on."""
        self._reuse.stop()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Random numbers of a finished run, if it was started once more."""
        self._random.restore_numbers(trainer)

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch which quantized layers the first batch reaches."""
        root = quantization_root(pl_module)
        # Once for a module: a compiled graph keeps the hooks of its first trace and would not call later ones.
        if self._probe is None and not vars(root).get(REACHED_ATTRIBUTE, False):
            self._probe = ReachProbe(root)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A quantizer that the first batch never called would silently leave its layer in full precision."""
        merge_ranges(quantization_root(pl_module))
        if self._probe is not None and self._probe.watching:
            self._probe.remove()
            self._probe.note_rounded_weights()
            missed = self._probe.missed()
            vars(quantization_root(pl_module))[REACHED_ATTRIBUTE] = not missed
            if not missed:
                return
            if not self._probe.eager and is_compiled(pl_module):
                self._probe = ReachProbe(quantization_root(pl_module), eager=True)  # a graph of before calls no hooks: look once more
                return
            message = (
                f"{len(missed)} quantized layers were not called by the first batch, the first are {missed[:3]}; if the model bypasses "
                "them, exclude them from the scheme or call the layers instead of reading their weights; if they are used later, pass "
                "allow_partial=True"
            )
            if not self.allow_partial:
                raise MisconfigurationException(message)
            rank_zero_warn(message)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """No weight changes until the end of the loop."""
        self._reuse.start(trainer, quantization_root(pl_module))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The end of that."""
        self._reuse.stop(evaluation=True)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """No weight changes until the end of the loop."""
        self._reuse.start(trainer, quantization_root(pl_module))

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The end of that."""
        self._reuse.stop(evaluation=True)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """No weight changes until the end of the loop."""
        self._reuse.start(trainer, quantization_root(pl_module))

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The end of that."""
        self._reuse.stop(evaluation=True)

    @override
    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Weights are saved as they are stored, so say which dtype they were quantized in; and keep the random states of all ranks."""
        checkpoint[WEIGHT_DTYPES] = weight_dtypes(quantization_root(pl_module))
        checkpoint[ROOT] = getattr(pl_module, "quantization_root", None)
        self._random.save(trainer, checkpoint)

    @override
    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the grid that was trained, also under a strategy that rounds nothing."""
        refuse_unfinished_schedules(trainer, checkpoint)
        set_weight_dtypes(quantization_root(pl_module), checkpoint.get(WEIGHT_DTYPES, {}))
        if trainer.state.fn == TrainerFn.FITTING:
            self._random.load(trainer, checkpoint)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plain data, for comparison when a checkpoint is loaded."""
        return {"format_version": STATE_VERSION, "scheme": self.scheme.to_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained with another scheme."""
        if state_dict.get("format_version") != STATE_VERSION:
            raise MisconfigurationException(
                f"QuantizationCallback: the checkpoint's state has version {state_dict.get('format_version')!r}, expected {STATE_VERSION}"
            )
        there = QuantScheme.parse(state_dict["scheme"])
        if there != self.scheme:
            changed = differences(there.to_dict(), self.scheme.to_dict(), "in the checkpoint")
            raise MisconfigurationException(
                "QuantizationCallback: the checkpoint was trained with another scheme:\n  " + "\n  ".join(changed)
            )


def quantization_root(pl_module: nn.Module) -> nn.Module:
    """The module below which a LightningModule is quantized: ``quantization_root`` names it, else the module itself."""
    path = getattr(pl_module, "quantization_root", None)
    if path is None:
        return pl_module
    if not isinstance(path, str):
        raise MisconfigurationException(f"quantization_root: got {path!r}, expected the dotted name of a submodule")
    return pl_module.get_submodule(path)
