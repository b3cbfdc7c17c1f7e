"""The embedded engine: any causal language model of transformers, with continuous batching.

Requests decode in one batch that others join and leave between two steps. A step first prefills waiting
prompts, at most `PREFILL_TOKENS` tokens of them so that a long prompt does not stall the others, and then
decodes one token for every sequence. A sequence is admitted when the cache can hold what is planned for it, first come
first served: a request that names no limit may come to the whole context, and hardly one does. Where the plans of those that
run outgrow the memory after all, the one that began last makes room: it goes back to the head of the queue, and later
its tokens so far are prefilled again. So no request fails for memory halfway, and who reads it sees a pause.

Why not the continuous-batching manager that transformers ships (read and tried at 5.23): on a CPU it decodes
about as fast as `generate` and idles well, but sampling is a property of the manager, from one global random
generator, so requests cannot differ in greedy or sampled and cannot have a seed; it reports one
log-probability a token (no alternatives) and none for the prompt, which `echo` needs; and it reserves its
whole cache when it starts, sized by the machine and not by what runs. Sampling and logits are inside its
step, where it has no extension point. What is used of transformers is its public `Cache` classes
(`kv_cache.py`).
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from compress.errors import UsageError
from serve.engines import loading
from serve.engines.base import EngineBusyError, EngineDeadError, EngineStats, SamplingParams, Sink, Ticket
from serve.engines.kv_cache import BatchCache, keys_and_values, slots_for
from serve.engines.ranges import read_advice
from serve.engines.sampling import next_tokens, top_logprobs
from serve.engines.sequence import Sequence
from serve.engines.text import TokenPieces
from serve.linear import backends
from serve.loading import weight_bytes

log = logging.getLogger("halve.serve")

PREFILL_TOKENS = 512
MAX_WAITING = 4096  # sequences in the queue; each holds its prompt, and who comes last would wait for all of them
SCORED_ROWS = 128  # positions whose log-softmax over the vocabulary is in memory at once


class TransformersEngine:
    """Serves a local checkpoint, dense or packed. See `base.Engine` for the contract.

    Key/value memory is bounded: at most ``max_num_seqs`` sequences of at most ``max_model_len`` tokens, and
    never more than half of the memory that is free once the model is loaded.
    """

    def __init__(
        self,
        model_dir: str,
        *,
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        if max_num_seqs < 1:
            raise UsageError(f"--max-num-seqs {max_num_seqs}: at least one sequence has to run.")
        self._model_dir = model_dir
        self._wished_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._device_wish, self._dtype_wish = device, dtype

        self._changed = threading.Condition()  # guards the two below
        self._arrived: deque[Sequence] = deque()
        self._closing = False
        self.failure: str | None = None

        self._waiting: deque[Sequence] = deque()
        self._prefilling: Sequence | None = None
        self._running: list[Sequence] = []  # in the order of the rows of the cache
        self._cache = BatchCache(max_num_seqs, 0)
        self._begun = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._preemptions = 0

    def load(self) -> None:
        """Reads the model, chooses the limits and starts the thread. Raises a `HalveError`."""
        self.model, self.tokenizer, notes = self._read()
        self._pieces = TokenPieces(self.tokenizer)
        config = self.model.config.get_text_config()
        self._device = self.model.device
        self._one_row_of_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        generation = self.model.generation_config or GenerationConfig()
        self._eos_ids = _ids(generation.eos_token_id) | _ids(self.tokenizer.eos_token_id)
        self.default_sampling: Mapping[str, float]
        self.default_sampling, advice = read_advice(generation.to_dict(), self._model_dir)
        notes += advice

        self.max_model_len, why = loading.choose_context(config, self.tokenizer, self._wished_len)
        self._budget = self._size_budget()
        self._cache = BatchCache(self._max_num_seqs, self._budget)
        self._describe()
        notes.append(f"max_model_len {self.max_model_len}: {why}")
        notes.append(
            f"key/value cache up to {self._budget * self._bytes_per_token / 2**20:,.0f} MiB, which is "
            f"{self._budget // slots_for(1, self.max_model_len)} of {self._max_num_seqs} sequences at their longest"
        )
        for note in notes:
            log.info(note)
        self._thread = threading.Thread(target=self._run, name="halve-engine", daemon=True)
        self._thread.start()

    def _read(self) -> tuple[Any, Tokenizer, list[str]]:
        """The model, its tokenizer, and one line for each choice that was made."""
        return loading.load_checkpoint(self._model_dir, self._device_wish, self._dtype_wish)

    def _describe(self) -> None:
        """Notes what is reported of the model."""
        self.vocab_size = _rows(self.model.get_input_embeddings())
        self._weight_bytes = weight_bytes(self.model)
        self._backends = backends(self.model, {"prefill": PREFILL_TOKENS, "decode": 1})

    @torch.inference_mode()
    def _size_budget(self) -> int:
        """The most cache slots to allocate. One token is run to see what a slot costs in this model."""
        cache = DynamicCache()
        self._forward([[0]], cache, first_position=0)
        self._bytes_per_token = sum(keys.nbytes + values.nbytes for keys, values in keys_and_values(cache))
        free = loading.cache_slots(self._bytes_per_token, self._device)
        one = slots_for(1, self.max_model_len)
        if one > free:
            fits = int(free / 1.25) - 64
            if self._wished_len is not None or fits < 1:
                raise UsageError(
                    f"--max-model-len {self.max_model_len} needs {one * self._bytes_per_token / 2**20:,.0f} "
                    f"MiB of keys and values for one sequence; half of the free memory is "
                    f"{free * self._bytes_per_token / 2**20:,.0f} MiB. Ask for at most {max(fits, 0)}."
                )
            log.warning("max_model_len is lowered from %d to %d: more keys and values would not fit half of "
                        "the free memory.", self.max_model_len, fits)  # fmt: skip
            self.max_model_len = fits
        return min(free, slots_for(self._max_num_seqs, self.max_model_len))

    # What other threads call.

    def submit(self, prompt_ids: SequenceOf[int], params: SamplingParams, sink: Sink) -> Ticket:
        sequence = Sequence(prompt_ids, params, sink, pieces=self._pieces, eos_ids=self._eos_ids)
        with self._changed:
            if self.failure is not None or self._closing:
                raise EngineDeadError(self.failure or "The server is shutting down.")
            if len(self._arrived) + len(self._waiting) >= MAX_WAITING:
                raise EngineBusyError(f"{MAX_WAITING} sequences wait already. Try again later.")
            self._arrived.append(sequence)
            self._changed.notify()
        return sequence

    def cancel(self, ticket: Ticket) -> None:
        assert isinstance(ticket, Sequence)
        with self._changed:
            ticket.cancelled = True
            self._changed.notify()

    def stats(self) -> EngineStats:
        prefilling = int(self._prefilling is not None and self._prefilling not in self._running)
        return EngineStats(
            running=len(self._running) + prefilling,
            waiting=len(self._waiting) + len(self._arrived),
            kv_cache_usage=min(1.0, self._planned_slots() / self._budget),
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            weight_bytes=self._weight_bytes,
            kv_cache_bytes=self._budget * self._bytes_per_token,
            backends=self._backends,
            preemptions=self._preemptions,
        )

    def _planned_slots(self) -> int:
        prefilling = self._prefilling
        active = {*self._running, prefilling} if prefilling is not None else {*self._running}
        return slots_for(len(active), max(sequence.planned_length for sequence in active)) if active else 0

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=30)

    # What the engine's thread does.

    def _run(self) -> None:
        message = "The server is shutting down."
        try:
            while self._wait_for_work():
                self._step()
        except BaseException as error:
            # Whatever it is, the model or its cache can no longer be trusted: die visibly, never in silence.
            log.exception("The engine died.")
            message = f"The engine died: {type(error).__name__}: {error}"
        with self._changed:
            self.failure = message
            left = [*self._running, *self._waiting, *self._arrived]
            left += [self._prefilling] if self._prefilling is not None else []
            self._arrived.clear()
        self._waiting.clear()
        self._running.clear()
        self._prefilling = None
        self._cache = BatchCache(self._max_num_seqs, self._budget)
        for sequence in left:
            if not sequence.ended:
                sequence.sink(sequence.fail(message))

    def _wait_for_work(self) -> bool:
        """Sleeps while there is nothing to do; False when the engine is to stop."""
        with self._changed:
            while not (self._closing or self._arrived or self._waiting or self._prefilling or self._running):
                self._changed.wait()
            self._waiting.extend(self._arrived)
            self._arrived.clear()
            return not self._closing

    @torch.inference_mode()
    def _step(self) -> None:
        self._drop_cancelled()
        budget = PREFILL_TOKENS
        while budget > 0 and (self._prefilling or self._admit()):
            budget -= self._prefill(budget)
        if self._running:
            self._decode()

    def _drop_cancelled(self) -> None:
        if any(sequence.cancelled for sequence in self._waiting):
            self._waiting = deque(s for s in self._waiting if not s.cancelled)
        if self._prefilling is not None and self._prefilling.cancelled:
            self._prefilling = None
        for row in reversed(range(len(self._running))):
            if self._running[row].cancelled:
                self._leave(row)

    def _admit(self) -> bool:
        """Takes the next waiting sequence to prefill, if the cache can hold what is planned for it and for the others."""
        if not self._waiting or len(self._running) >= self._max_num_seqs:
            return False
        lengths = [sequence.planned_length for sequence in (*self._running, self._waiting[0])]
        if self._running and not self._cache.fits(len(lengths), max(lengths)):
            return False
        self._prefilling = sequence = self._waiting.popleft()
        if sequence.number < 0:
            sequence.number, self._begun = self._begun, self._begun + 1
        sequence.begin(DynamicCache())
        return True

    def _preempt(self) -> None:
        """The running sequence that began last makes room for the others."""
        row = max(range(len(self._running)), key=lambda row: self._running[row].number)
        sequence = self._running[row]
        self._leave(row)
        self._put_back(sequence)

    def _put_back(self, sequence: Sequence) -> None:
        """To the head of the queue, without its cache. (It will not be admitted at once: what it needs now did not fit.)"""
        self._waiting.appendleft(sequence)
        self._preemptions += 1

    def _prefill(self, budget: int) -> int:
        """Runs the next chunk of a prompt, and what follows from its end. Returns the tokens spent."""
        sequence = self._prefilling
        assert sequence is not None
        assert sequence.prefill_cache is not None
        first, ids, goes_on = sequence.prefilled, sequence.prefill_ids, bool(sequence.generated)
        chunk = list(ids[first : first + budget])
        scored = sequence.params.prompt_logprobs is not None and not goes_on
        logits = self._forward([chunk], sequence.prefill_cache, first_position=first, all_logits=scored)[0]
        if scored:
            self._score(sequence, logits, ids[first + 1 : first + 1 + len(chunk)])
        sequence.prefilled += len(chunk)
        if sequence.prefilled < len(ids):
            return len(chunk)
        if not goes_on:
            self._prompt_tokens += len(ids)
            if sequence.params.max_tokens == 0:
                sequence.sink(sequence.push_nothing())
            else:
                self._advance([sequence], logits[-1:].float())
        if not sequence.ended and (not self._running or self._cache.can_insert(len(ids))):
            self._cache.insert(sequence.prefill_cache, len(ids))
            self._running.append(sequence)
        elif not sequence.ended:
            self._put_back(sequence)
        sequence.end_prefill()
        self._prefilling = None  # last, so that an engine that dies on the way still knows of it
        return len(chunk)

    def _score(self, sequence: Sequence, logits: torch.Tensor, targets: SequenceOf[int]) -> None:
        """Records the log-probabilities of ``targets``, the tokens that follow the rows of ``logits``."""
        for at in range(0, len(targets), SCORED_ROWS):
            part = torch.tensor(list(targets[at : at + SCORED_ROWS]), device=logits.device)
            rows = logits[at : at + len(part)]
            sequence.prompt_logprobs += top_logprobs(rows, part, sequence.params.prompt_logprobs or 0)

    def _decode(self) -> None:
        """One token for every running sequence."""
        while len(self._running) > 1 and not self._cache.can_step():
            self._preempt()
        self._cache.make_room()
        logits = self._forward([[s.last_token] for s in self._running], self._cache)
        self._cache.step_done()
        self._advance(self._running, logits[:, -1].float())
        for row in reversed(range(len(self._running))):
            if self._running[row].ended:
                self._leave(row)

    def _leave(self, row: int) -> None:
        """Removes a row; like in the cache, the last one takes its place."""
        self._cache.remove(row)
        self._running[row] = self._running[-1]
        self._running.pop()

    def _forward(
        self,
        ids: list[list[int]],
        cache: DynamicCache | BatchCache,
        *,
        first_position: int | None = None,
        all_logits: bool = False,
    ) -> torch.Tensor:
        """Logits [rows, positions, vocab]: of all positions, or of the last one where that is enough.

        ``first_position`` is that of a prompt's chunk; without one, each row is at the end of its sequence.
        """
        if isinstance(cache, BatchCache):
            positions, mask = [[length] for length in cache.lengths], cache.attention_mask()
        else:
            assert first_position is not None
            positions, mask = [list(range(first_position, first_position + len(ids[0])))], None
        extra = {"logits_to_keep": 1} if self._one_row_of_logits and not all_logits else {}
        output = self.model(
            input_ids=torch.tensor(ids, device=self._device),
            position_ids=torch.tensor(positions, device=self._device),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **extra,
        )
        return output.logits

    def _advance(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Chooses the next token of each sequence from ``logits`` [rows, vocab] and reports it."""
        for sequence, choice in zip(sequences, next_tokens(logits, sequences), strict=True):
            if isinstance(choice, str):
                sequence.sink(sequence.fail(choice))
            else:
                self._generation_tokens += 1
                sequence.sink(sequence.push(*choice))


def _rows(embedding: torch.nn.Module) -> int:
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def _ids(value: object) -> frozenset[int]:
    """The end-of-sequence ids, which are written as none, one or a list of them."""
    return frozenset(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
