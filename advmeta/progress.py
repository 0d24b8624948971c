"""Live progress in a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from advmeta.evaluation.transfer_config import TransferConfig
from advmeta.meta_training_config import MetaTrainingConfig

_SECONDS_BETWEEN_LINES = 15.0


class _Bar:
    """A progress bar; where there is no terminal, a line now and then."""

    def __init__(self, title: str, total: int, console: Console):
        self._console, self._total, self._done, self._last_line = console, total, 0, 0.0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._title = title
        self._task = self._progress.add_task(title, total=total, text="compiling")

    def __enter__(self):
        self._progress.start()
        if not self._console.is_terminal:
            self._console.print(f"{self._title}: compiling", markup=False)
        return self

    def __exit__(self, *_):
        self._progress.stop()

    def show(self, done: int, text: str) -> None:
        self._progress.update(self._task, completed=done, text=text)
        now = time.monotonic()
        due = now - self._last_line > _SECONDS_BETWEEN_LINES or done == self._total
        if due and not self._console.is_terminal:
            self._last_line = now
            line = f"{self._title}: {done}/{self._total}  {text}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class MetaTrainingProgress(_Bar):
    """Outer steps, the meta-loss, accuracy on the selection tasks, and what went wrong."""

    def __init__(self, config: MetaTrainingConfig, console: Console):
        super().__init__("meta-training", config.outer_steps, console)
        self._accuracy, self._skipped, self._lost = "", 0, 0

    def update(self, record: dict) -> None:
        self._skipped += record["skipped_steps"]
        self._lost += record["lost_episodes"]
        if "robust_accuracy" in record:
            clean, robust = record["clean_accuracy"], record["robust_accuracy"]
            self._accuracy = f"  robust {robust:.3f}  clean {clean:.3f}"
        wrong = f"  skipped {self._skipped}" if self._skipped else ""
        wrong += f"  lost episodes {self._lost}" if self._lost else ""
        speed = f"  {record['outer_step'] / max(record['seconds'], 1e-9):.1f} steps/s"
        text = f"loss {record['meta_loss']:.3f}{self._accuracy}{wrong}{speed}"
        self.show(record["outer_step"], text)


class TableProgress(_Bar):
    """The parts of the transfer table; a part is a message of `transfer_cells`."""

    def __init__(self, config: TransferConfig, console: Console, cells_done: int = 0):
        each = 2 if config.attack == "autoattack" else 1
        parts = 1 + each * config.entries  # of a cell: tuning comes first
        # After the first cell comes a look at its model.
        super().__init__("transfer table", len(config.cells) * parts + 1, console)
        self._done = cells_done * parts + (cells_done > 0)

    def update(self, message: str) -> None:
        self._done += 1
        self.show(self._done, message)
