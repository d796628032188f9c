"""What can go wrong around a training run, on purpose; see `reliability`."""

import dataclasses


@dataclasses.dataclass
class Outcome:
    """How often something went wrong, and what came of it.

    Attributes:
        fault: What went wrong.
        injected: How often.
        survived: How often all was as it should be.
        lost: What was lost at most, in words.
        failures: What was not as it should be, in words, with the seed that brings it back.
    """

    fault: str
    injected: int = 0
    survived: int = 0
    lost: str = "nothing"
    failures: list[str] = dataclasses.field(default_factory=list)

    def count(self, failure=None):
        """Counts one more, with what was wrong about it, if anything."""
        self.injected += 1
        if failure is None:
            self.survived += 1
        else:
            self.failures.append(failure)
