"""Gradient accumulation: windows of micro-batches, and what their losses are divided by.

A *window* is the micro-batches of one optimizer step: ``accumulation_steps`` of them, fewer at the
end of an epoch. The loss of each micro-batch is its sum over tokens divided by the tokens of the
*window*, so the window's gradient is that of its concatenated rows, however they are split.

The loop, for every micro-batch:

    if not accumulator.pending:
        accumulator.open_window(size, num_items)
    (summed_loss / accumulator.num_items).backward()
    if accumulator.should_step():
        update, then zero_grad(set_to_none=True)
    accumulator.advance()
"""

from __future__ import annotations

from collections.abc import Mapping


class GradientAccumulator:
    """Counter of the micro-batches of a window; gradients stay in ``.grad``.

    ``accumulation_steps`` is the largest number of micro-batches that a window may have.
    """

    def __init__(self, accumulation_steps: int) -> None:
        self.accumulation_steps = _require_int("accumulation_steps", accumulation_steps, low=1)
        self._size = 0
        self._position = 0
        self._num_items = 0

    @property
    def position(self) -> int:
        """Micro-batches of the open window that are done: the index of the current one."""
        return self._position

    @property
    def size(self) -> int:
        """Micro-batches of the open window, done or not; 0 if none is open."""
        return self._size

    @property
    def num_items(self) -> int:
        """Denominator of the open window's loss: its target tokens; 0 if none is open."""
        return self._num_items

    @property
    def pending(self) -> bool:
        """Whether a window is open: some of its micro-batches are still to come."""
        return self._size > 0

    def open_window(self, size: int, num_items: int) -> None:
        """Begin a window of ``size`` micro-batches that have ``num_items`` targets together.

        Raises ``RuntimeError`` while the previous window is open, ``ValueError`` unless
        1 <= size <= accumulation_steps and num_items >= 0, ``TypeError`` for other types.
        """
        if self.pending:
            raise RuntimeError(
                f"the previous window must be finished first, got {self._position} of its "
                f"{self._size} micro-batches done; call advance() once per micro-batch"
            )
        size = _require_int("size", size, low=1, high=self.accumulation_steps)
        num_items = _require_int("num_items", num_items, low=0)
        self._size, self._num_items = size, num_items

    def should_step(self) -> bool:
        """Whether the current micro-batch is the window's last."""
        return self.pending and self._position + 1 == self._size

    def advance(self) -> None:
        """Count the current micro-batch as done, after its backward pass and the update, if any;
        the last one closes the window.

        Raises ``RuntimeError`` if no window is open.
        """
        if not self.pending:
            raise RuntimeError("a window must be open, got none; call open_window() first")
        self._position += 1
        if self._position == self._size:
            self._size = self._position = self._num_items = 0

    def state_dict(self) -> dict[str, int]:
        """Plain integers; between windows all but ``accumulation_steps`` are 0."""
        return {
            "accumulation_steps": self.accumulation_steps,
            "gradient_accumulator_step_count": self._position,
            "window_size": self._size,
            "num_items": self._num_items,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the counts of ``state_dict``.

        The caller restores the gradients accumulated until then: without them the open window would
        have too little weight. Raises ``ValueError`` for an impossible state: an open window larger
        than ``accumulation_steps``, or a position outside its window.
        """
        size = _require_int("window_size", state["window_size"], 0, self.accumulation_steps)
        done = state["gradient_accumulator_step_count"]
        position = _require_int("gradient_accumulator_step_count", done, 0, max(size - 1, 0))
        num_items = _require_int("num_items", state["num_items"], low=0)
        self._size, self._position, self._num_items = size, position, num_items


def _require_int(name: str, value: object, low: int, high: int | None = None) -> int:
    bounds = f"be an integer of at least {low}" if high is None else f"lie in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must {bounds}, got {value!r}; pass a Python integer")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must {bounds}, got {value}; count micro-batches and targets")
    return value
