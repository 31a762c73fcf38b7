"""The progress bar: tqdm where it is installed, nothing where it is not or where nobody watches."""

from __future__ import annotations

from types import TracebackType

try:
    from tqdm import tqdm
except ImportError:  # measuring needs torch alone, so that it runs on any machine as it is
    tqdm = None


class Progress:
    """A bar with the time left, on stderr if that is a terminal, so that stdout holds results only.

    Args:
        total: amount of work, in any unit that is roughly proportional to time.
    """

    def __init__(self, total: float) -> None:
        self._bar = tqdm and tqdm(
            total=total,
            bar_format="{desc} {percentage:3.0f}% |{bar:30}| {elapsed} elapsed, {remaining} left",
            disable=None,  # that is: unless stderr is a terminal
            leave=False,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def label(self, text: str) -> None:
        """Say what is being worked on."""
        if self._bar is not None:
            self._bar.set_description_str(text)

    def advance(self, amount: float) -> None:
        """Count work as done."""
        if self._bar is not None:
            self._bar.update(amount)

    def write(self, text: str) -> None:
        """Print a result above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)
