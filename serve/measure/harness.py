"""The model as lm-eval sees it: one class, whatever runs the model (`scoring.Runner`).

Text is cut into tokens as lm-eval's own `HFLM` does it. One thing differs: where several tokens are equally
likely to the last bit, which happens in 16 bit, each of them counts as the greedy choice. An endpoint gives
log-probabilities and not the order of ids, so this is what can be told the same in both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs

from compress.errors import HalveError, UsageError
from serve.measure.scoring import Runner

Progress = Callable[[int, int, str], None]


class HalveLM(TemplateLM):
    """lm-eval's requests, answered by a `Runner` that is open."""

    def __init__(self, runner: Runner, tokenizer: Any, progress: Progress) -> None:
        super().__init__()
        self._runner, self.tokenizer, self._progress = runner, tokenizer, progress

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context consists of."""
        beginning = self.tokenizer.bos_token_id
        chosen = self.tokenizer.eos_token_id if beginning is None else beginning
        if chosen is None:
            raise UsageError(
                "the tokenizer has neither a token to begin with nor one to end with, which this task needs"
            )
        return chosen

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        # The tokenizer adds what it adds, unless the text begins with it already.
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.bos_token):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **special)["input_ids"])

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The sum of the continuation's log-probabilities, and whether each of its tokens is a likeliest one."""
        prompts = []
        for (context, _), before, after in requests:
            if not before or not after or len(after) >= self._runner.max_length:
                raise HalveError(
                    f"a continuation of {len(after)} tokens after {len(before)} cannot be scored; the model reads at most "
                    f"{self._runner.max_length} tokens (the text begins: {context[:40]!r})"
                )
            prompts.append((before + after)[-self._runner.max_length :])
        scores = self._runner.score(prompts, self._telling(len(prompts), "prompts of tasks scored"))
        results = []
        for (_, _, after), scored in zip(requests, scores, strict=True):
            logprobs, best = scored.logprobs[-len(after) :], scored.best[-len(after) :]
            greedy = all(value >= top for value, top in zip(logprobs, best, strict=True))
            results.append((sum(logprobs), greedy))
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-probability of whole texts, in windows that do not overlap, each after one token of context."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            for pair in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._runner.max_length - 1,
                context_len=1,
            ):
                before, after = utils.make_disjoint_window(pair)
                windows.append((("", ""), before, after))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations; a context that is too long loses its beginning."""
        jobs = []
        for request in requests:
            arguments: tuple[Any, ...] = request.args
            context, given = arguments
            options: dict[str, Any] = {**normalize_gen_kwargs(given)}
            if options["do_sample"]:
                raise UsageError(
                    "this task samples its answers, and `halve eval` is greedy, so that figures can be repeated"
                )
            most = min(options["max_gen_toks"], self._runner.max_length - 1)
            ids = self.tok_encode(context)[-(self._runner.max_length - most) :]
            jobs.append((ids, most, tuple(stop for stop in options["until"] if stop)))
        return self._runner.generate(jobs, self._telling(len(jobs), "answers to tasks generated"))

    def _telling(self, total: int, what: str) -> Callable[[int], None]:
        """Tells of about fifty steps on the way to a total that may be many thousand."""
        stride = max(1, total // 50)

        def tell(count: int) -> None:
            if count % stride == 0 or count == total:
                self._progress(count, total, what)

        return tell
