"""Putting the layers together: from a configuration to a finished run. Only the command line composes."""

import io
import logging
import platform
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from rich.console import Console
from rich.table import Table

import aclip
from aclip import data, dist, exporters, models, plan
from aclip.cli.compose_evaluation import HeldOut, evaluate_sets, name_skipped
from aclip.cli.recipes import dataflow_table
from aclip.config import to_dict
from aclip.data.fetch import resolve_spec
from aclip.engine.console import ProgressSink, TensorBoardSink
from aclip.engine.loop import Sink, fit, resume
from aclip.engine.memory import available_memory, note_peak_memory, remedies, shortage
from aclip.engine.run_config import RESUMABLE, RunConfig, Timetable, choose_device, saved_config, settled
from aclip.engine.score_cache import open_caches
from aclip.engine.trainer import Trainer
from aclip.errors import BadSampleError, ConfigError, MissingDependencyError
from aclip.evaluation import Retrieval
from aclip.method import Method
from aclip.report import take_snapshot, write_report
from aclip.rng import generator
from aclip.run_folder import RunFolder

SNAPSHOT_PICTURES = 8

_log = logging.getLogger(__name__)


def open_held_out(specs: Sequence[str]) -> list[HeldOut]:
    """Open `[NAME=]SOURCE` specifications; a name not given is `set_name` of the source.

    Raises:
        ConfigError: two sets of one name, whose results could not be told apart.
    """
    found = []
    for spec in specs:
        name, separator, rest = spec.partition("=")
        if not (separator and name.replace("-", "_").isidentifier()):
            name, rest = set_name(spec), spec
        found.append(HeldOut(name, open_by_spec(rest)))
    twice = [name for name, count in Counter(held.name for held in found).items() if count > 1]
    if twice:
        raise ConfigError(f"two held-out sets are called '{twice[0]}': name them apart, as in NAME=SOURCE")
    return found


def set_name(spec: str) -> str:
    """Return the last word of a source, with the slice where it is a part of one: parts are sets of their own.

    >>> set_name("emoji:val"), set_name("emoji:val[:60]"), set_name("lists/val.csv?images=d/pictures")
    ('val', 'val[0:60]', 'val')
    """
    whole, part = data.split_slice(spec)
    if part is None:
        return Path(data.split_query(spec)[0].rpartition(":")[2]).stem
    first, last = part
    return f"{set_name(whole)}[{first}:{'' if last is None else last}]"


def open_by_spec(spec: str) -> data.Source:
    """Open any source that the command line takes, sets of `aclip data fetch` included."""
    return data.open_source(resolve_spec(spec))


def open_training(specs: str | Sequence[str]) -> data.Source:
    """Open what a run trains on: one source, or a mixture of several with their weights."""
    return data.open_mixture(specs, open_by_spec)


def train_run(
    config: RunConfig, folder: RunFolder, *, resumed: bool, command: str, device_name: str | None = None
) -> None:
    """Train a run from its start or its newest checkpoint, evaluate it, write model and report; on every rank.

    Rank 0 evaluates, writes and prints.

    Args:
        config: the same on every rank.
        folder: of the run, where rank 0 writes.
        resumed: whether it holds a run that goes on.
        command: what started the run, for the record.
        device_name: of this rank; None is the configuration's.
    """
    console = Console(highlight=False, quiet=dist.rank() > 0)
    device = choose_device(device_name or config.device)
    source = open_training(config.data)
    config = settled(config, len(source), device)
    held_out = open_held_out(config.validation)

    trainer = build_trainer(config, len(source), device)
    too_large = shortage(trainer.estimate, available_memory(device))
    model, resolved, timetable = trainer.wrapped.shown.model, trainer.method.plan, trainer.timetable

    dataflow = dataflow_table(resolved, config.model, text_tokens=14)
    if resumed:
        check_same_data(folder, config, len(source), held_out)
        resume(trainer, folder)
        if dist.rank() == 0:
            note_changes(folder, config, held_out, trainer.step)
    elif dist.rank() == 0:
        folder.create()
        folder.write_json("config.json", to_dict(config) | {
            "num_pairs": len(source), "held_out_pairs": sizes(held_out), "command": command,
            "dataflow": plain_text(dataflow), "versions": versions(device)})
    if trainer.step < timetable.total_steps:
        trainer.score_caches = open_caches(folder.path, resolved, samples=len(source),
                                           steps_per_epoch=timetable.steps_per_epoch, fresh=not resumed)
    print_header(console, config, trainer, dataflow, len(source))
    if too_large and dist.rank() == 0:
        _log.warning("%s: if that is too little, use %s", too_large, remedies(config))

    tokenizer = data.CaptionTokenizer(models.tokenizer_of(config.model))
    encoder = models.LoadedModel(model, tokenizer)
    dataset = open_dataset(trainer, source, tokenizer)
    if trainer.method.frequencies is not None and trainer.step == 0:
        trainer.method.frequencies.copy_(data.token_frequencies(
            source, tokenizer, resolved.shape.vocab_size, seed=config.seed))
    examiner = Examiner(config, folder, trainer, encoder, held_out, dataset, console)
    batches = partial(open_batches, trainer, dataset, timetable.total_steps,
                      workers=data.suitable_workers(device, config.workers))
    if trainer.step == 0:
        examiner.look(0)
    if trainer.step < timetable.total_steps or trainer.owes_evaluation:
        with ExitStack() as open_sinks:
            if dist.rank() == 0:
                open_sinks.callback(note_peak_memory, folder, device)
            sinks: list[Sink] = [
                open_sinks.enter_context(ProgressSink(console, timetable.total_steps, trainer.step))]
            if config.tensorboard and dist.rank() == 0:
                writer = open_sinks.enter_context(tensorboard_writer(folder, trainer.step))
                sinks.append(TensorBoardSink(writer))
            fit(trainer, batches, folder, sinks, examiner.examine)
    for cache in trainer.score_caches.values():
        cache.remove()
    trainer.wrapped.refresh()
    if dist.rank() > 0:
        return
    model_config = models.model_config(config.model, image_size=config.image_size)
    exporters.open_clip.save(model, model_config, models.preprocess_config(model), tokenizer, folder.final)
    finish(folder, console)


def build_trainer(config: RunConfig, num_pairs: int, device: torch.device) -> Trainer:
    """Return a settled run's trainer with a fresh model, at its first step."""
    torch.manual_seed(config.seed)
    shape = models.shape_of(models.model_config(config.model, image_size=config.image_size))
    resolved = plan.resolve(config.recipe, shape)
    if config.unmasked_tuning > 0 and plan.asks_only_of_masked(config.recipe):
        raise ConfigError(f"--unmasked-tuning has nothing to teach: recipe '{config.recipe.name}' asks for nothing but "
                          "what the mask hides")
    model = models.create_model(config.model, image_size=config.image_size, with_text=resolved.uses_text)
    pixels = models.preprocess_config(model)
    method = Method(model, resolved, pixels["mean"], pixels["std"]).to(device).train()
    return Trainer(config, method, Timetable.of(config, num_pairs), device)


def open_dataset(trainer: Trainer, source: data.Source, tokenizer: data.CaptionTokenizer) -> data.PairDataset:
    """Return what a run reads of its source."""
    resolved = trainer.method.plan
    return data.PairDataset(source, resolved.pipeline, tokenizer, sizes=resolved.view_sizes, seed=trainer.config.seed)


def open_batches(trainer: Trainer, dataset: data.PairDataset, total_steps: int, workers: int) -> data.BatchLoader:
    """Return the batches of a run's steps, from the trainer's next one to `total_steps`."""
    assert trainer.config.batch_size is not None
    return data.build_loader(
        dataset, batch_size=trainer.config.batch_size, start_step=trainer.batch_number,
        total_steps=total_steps + trainer.skipped_batches,
        workers=workers, device=trainer.device,
        cut_text=models.cut_after_eot if trainer.method.plan.shape.text_cut else None,
        rank=dist.rank(), world_size=dist.world_size(),
    )


def sizes(held_out: Sequence[HeldOut]) -> dict[str, int]:
    """Return the number of pairs of every set, by its name."""
    return {held.name: len(held.source) for held in held_out}


def check_same_data(folder: RunFolder, config: RunConfig, num_pairs: int, held_out: Sequence[HeldOut]) -> None:
    """Refuse to resume on pairs that have grown or shrunk, or are mixed otherwise: their order would be another.

    Raises:
        ConfigError: another number of pairs than when the run was started, in training or in a held-out set of the
            same name, or other weights of a mixture.
    """
    before = folder.read_json("config.json")
    known = {"the data": before.get("num_pairs")} | {
        f"held-out set '{name}'": size for name, size in before.get("held_out_pairs", {}).items()}
    now = {"the data": num_pairs} | {f"held-out set '{name}'": size for name, size in sizes(held_out).items()}
    for what, size in now.items():
        if known.get(what) not in (None, size):
            raise ConfigError(f"{what} of {folder.path} had {known[what]:,} pairs when the run was started and has "
                              f"{size:,} now: put it back to resume, or start a new run")
    if data.weights_of(saved_config(folder).data) != data.weights_of(config.data):
        raise ConfigError(f"--data names other sources or weights than the run in {folder.path} was started with: a "
                          "resumed run takes as many, with the same weights, from another place")


def note_changes(folder: RunFolder, config: RunConfig, held_out: Sequence[HeldOut], step: int) -> None:
    """Write to `config.json` which settings a resumed run has otherwise from here on, and in `changes` the old ones."""
    saved, now = to_dict(saved_config(folder)), to_dict(config)
    old = {name: saved[name] for name in RESUMABLE if saved[name] != now[name]}
    if not old:
        return
    written = folder.read_json("config.json")
    folder.write_json("config.json", written | now | {
        "held_out_pairs": written.get("held_out_pairs", {}) | sizes(held_out),
        "changes": [*written.get("changes", []), {"step": step, "before": old}]})


def finish(folder: RunFolder, console: Console) -> None:
    """Name what was skipped, write the report, and say where the results are."""
    bad = [(record["key"], record["reason"]) for record in folder.records("skipped")]
    if bad:
        console.print(f"{name_skipped(bad)}; all in {folder.path}/skipped.jsonl", markup=False, soft_wrap=True)
    report = write_report(folder.path)
    console.print(f"done. model: {folder.final}  report: {report}", markup=False, soft_wrap=True)


class Examiner:
    """Evaluates the model in training on every held-out set, and keeps a picture of what it looks at."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, trainer: Trainer, encoder: models.LoadedModel,
        held_out: Sequence[HeldOut], dataset: data.PairDataset, console: Console,
    ) -> None:
        self.config, self.folder, self.trainer, self.encoder = config, folder, trainer, encoder
        self.held_out, self.console = held_out, console
        shown = held_out[0].source if held_out else dataset.source
        self.shown = pick_pictures(shown, SNAPSHOT_PICTURES, config.seed)

    def look(self, step: int) -> None:
        """Keep a picture of what the model looks at after `step` optimizer steps; all ranks call it."""
        self.trainer.wrapped.refresh()
        if self.shown and dist.rank() == 0:
            images, captions = zip(*self.shown, strict=True)
            take_snapshot(self.trainer.wrapped.shown, images, captions, step, self.folder.snapshots)

    def examine(self, step: int) -> None:
        """Look, and evaluate, after `step` optimizer steps; all ranks call it, and rank 0 does it."""
        self.look(step)
        if self.trainer.method.plan.uses_text and dist.rank() == 0:
            evaluate_sets(self.encoder, self.held_out, (Retrieval(),), self.folder, self.console, step=step,
                          samples_seen=self.trainer.samples_seen, device=self.trainer.device,
                          workers=data.suitable_workers(self.trainer.device, self.trainer.config.workers))


def pick_pictures(source: data.Source, count: int, seed: int) -> list[tuple[Any, str]]:
    """Return a few usable (picture, caption) pairs of a source, the same ones for the same seed."""
    found: list[tuple[Any, str]] = []
    for index in generator(seed, "snapshot").permutation(len(source))[: 8 * count].tolist():
        try:
            raw = source.read(index)
            found.append((data.decode_image(raw.image), data.clean_captions(raw.captions)[0]))
        except BadSampleError:
            continue
        if len(found) == count:
            break
    return found


def print_header(console: Console, config: RunConfig, trainer: Trainer, dataflow: Table, num_pairs: int) -> None:
    """Say what is about to happen."""
    table = trainer.timetable
    console.print(dataflow)
    for resolution, plan_then in trainer.plans.items():
        for note in plan_then.notes:
            if note not in trainer.method.plan.notes:  # which the table above has
                console.print(f"at resolution {resolution:g}: {note}", markup=False, soft_wrap=True)
    console.print(groups_table(trainer))
    ranks = f", {dist.world_size()} processes ({config.parallel})" if dist.world_size() > 1 else ""
    parts = f", {trainer.micro_batch} pairs at a time" if trainer.in_parts else ""
    console.print(f"{config.precision} on {trainer.device}{ranks}{parts}; memory {trainer.estimate}", soft_wrap=True)
    console.print(f"{num_pairs:,} pairs, batch {config.batch_size}, {table.total_steps:,} steps "
                  f"({table.total_steps / table.steps_per_epoch:.1f} epochs), warm-up {table.warmup_steps}"
                  + (f", unmasked after step {table.masked_steps:,}" if table.masked_steps < table.total_steps else "")
                  + (f", from step {trainer.step:,}" if trainer.step else ""), soft_wrap=True)


def groups_table(trainer: Trainer) -> Table:
    """Return who is trained how, and what is not."""
    table = Table("parameters", "tensors", "millions", "weight decay", "learning rate", box=None, pad_edge=False)
    for group in trainer.groups:
        table.add_row(group.title, str(len(group.names)), f"{group.count / 1e6:.2f}", f"{group.weight_decay:g}",
                      f"x {group.lr_factor:.3g}")
    frozen = [p for p in trainer.method.model.parameters() if not p.requires_grad]
    if frozen:
        table.add_row("frozen", str(len(frozen)), f"{sum(p.numel() for p in frozen) / 1e6:.2f}", "", "")
    return table


def plain_text(table: Table) -> str:
    """Return a rich table as text."""
    console = Console(width=140, file=io.StringIO(), no_color=True)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def versions(device: torch.device) -> dict[str, str]:
    """Return what the run's numbers depend on besides its configuration."""
    return {
        "attentive-clip": aclip.__version__, "torch": torch.__version__, "open_clip": open_clip.__version__,
        "python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads",
    }


def tensorboard_writer(folder: RunFolder, step: int) -> Any:
    """Return a TensorBoard writer into the run folder, for what comes after optimizer step `step`.

    Closing it writes what it still holds. Events of later steps, from before a resume, are no longer shown.

    Raises:
        MissingDependencyError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError("--tensorboard needs the package tensorboard: "
                                     "pip install 'attentive-clip[tensorboard]'") from error
    return SummaryWriter(folder.path / "tensorboard", purge_step=step + 1)
