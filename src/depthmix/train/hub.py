"""`push_to_hub`: what is sent is the result, whole, and of checkpoints what a reader can use.

The Trainer's own way sends every file of the output folder, and the card without MoDE's section.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from depthmix.errors import ConfigError, DepthmixError

# Checkpoints within the run, what is being written, and what holds paths of this machine.
NOT_SENT = ["checkpoint-*", "checkpoint-*/**", ".*", "*.tmp", "training_args.bin"]
# What only the next step of training reads.
STATE = ["optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json"]


class Hub(TrainerCallback):
    """Sends a run to a repository, which is made before anything is loaded.

    Args:
        training: the `hub_*` options; `push_to_hub` is taken off it, so that the Trainer sends
            nothing by itself.

    Raises:
        ConfigError: there is no such repository, or no right to write to it.
    """

    def __init__(self, training: TrainingArguments) -> None:
        self._args = training
        self._api = HfApi(token=training.hub_token)
        self._sending: Future[Any] | None = None
        name = training.hub_model_id or Path(str(training.output_dir)).absolute().name
        training.push_to_hub = False
        try:
            made = self._api.create_repo(name, private=training.hub_private_repo, exist_ok=True)
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            raise ConfigError(
                f"push_to_hub: the repository {name} cannot be written to (hf auth login, or "
                f"hub_token, says who you are): {error}"
            ) from error
        self.repository = str(made.repo_id)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Send a checkpoint, if `hub_strategy` says so and the one before has been sent."""
        strategy = self._args.hub_strategy
        busy = self._sending is not None and not self._sending.done()
        if not state.is_world_process_zero or strategy == "end":
            return
        if busy and not self._args.hub_always_push:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        message = f"Training in progress, step {state.global_step}"
        self._sending = self._send(folder, message, [*NOT_SENT, *STATE], run_as_future=True)
        if strategy in ("checkpoint", "all_checkpoints"):
            place = "last-checkpoint" if strategy == "checkpoint" else folder.name
            self._sending = self._send(folder, message, [], path_in_repo=place, run_as_future=True)

    def finish(self, folder: Path) -> str:
        """Send the finished run and return its address.

        Raises:
            DepthmixError: it could not be sent; says how to send it by hand.
        """
        try:
            if self._sending is not None:
                self._sending.exception()  # waits; what comes now takes its place
            return str(self._send(folder, "End of training", NOT_SENT))
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise DepthmixError(
                f"the run is saved in {folder}, but could not be sent ({error}); send it with: "
                f"hf upload {self.repository} {folder} --exclude 'checkpoint-*' '.*'"
            ) from error

    def _send(self, folder: Path, message: str, without: list[str], **options: Any) -> Any:
        return self._api.upload_folder(
            repo_id=self.repository,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=without,
            revision=self._args.hub_revision,
            **options,
        )
