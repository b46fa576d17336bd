"""The sampler: it chooses the next token of each sequence from a batch of logits."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from pla_serve.engine.sampling.draw import draw
from pla_serve.engine.sampling.errors import (
    NOT_OF_ONE_REQUEST,
    GrammarError,
    SamplingError,
)
from pla_serve.engine.sampling.grammars import GrammarFollower, Grammars, forbid
from pla_serve.engine.sampling.logprobs import token_logprobs
from pla_serve.engine.sampling.noise import seed_key
from pla_serve.engine.sampling.penalties import Additions, add_to_logits, penalise
from pla_serve.engine.sampling.rowmax import row_max
from pla_serve.engine.sampling.sequence import LATE, Sampled, SequenceSampling
from pla_serve.engine.sampling.transfer import to_device, to_host
from pla_serve.wire.engine import SamplingParams, TokenLogprob

log = logging.getLogger(__name__)

NOT_FINITE = -1
NOTHING_LEFT = -2
NOT_READY = -3
"""The mask of the row is late, or its token is chosen already."""
ENDED = -5
"""The row's grammar allows nothing after the token before."""
RAISED = -4
"""The choice for this row raised an exception."""
WITHOUT_ERROR = {NOT_READY: LATE, ENDED: Sampled(-1, ended=True)}
ERRORS = {
    NOT_FINITE: "the model produced logits that are NaN or infinite; "
    "its weights may be damaged or its dtype too narrow",
    NOTHING_LEFT: "no token may follow: grammar, logit_bias and min_tokens exclude all of them",
}


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """Tokens of a batch that the device chooses and copies to the host."""

    sequences: Sequence[SequenceSampling]
    chosen: torch.Tensor
    """(n,) int64 on the device; an error code below 0 in rows without a token."""
    tokens: torch.Tensor
    """Copy of ``chosen`` on the host, valid once the device has finished the copy."""
    logprobs: dict[int, TokenLogprob]
    faults: dict[int, str] = field(default_factory=dict)
    """Message for the client of each row for which the choice raised an exception."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Tokens of some rows before they are copied to the host; see `TokenChoice`."""

    chosen: torch.Tensor
    logprobs: dict[int, TokenLogprob]
    faults: dict[int, str]

    def followed_by(self, other: _Rows) -> _Rows:
        """Return these rows and then the ``other`` ones."""
        size = len(self.chosen)
        return _Rows(
            torch.cat((self.chosen, other.chosen)),
            self.logprobs | {size + row: value for row, value in other.logprobs.items()},
            self.faults | {size + row: fault for row, fault in other.faults.items()},
        )


class Sampler:
    """Chooses tokens; the state of each sequence is in its `SequenceSampling`.

    Args:
        vocab_size: width of the logits.
        device: device of the logits.
        grammars: compiles grammars; None if requests with grammars are refused.
    """

    def __init__(
        self, vocab_size: int, device: torch.device, grammars: Grammars | None = None
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._grammars = grammars

    def start(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        eos_token_ids: frozenset[int],
        *,
        default_seed: int,
        output: Sequence[int] = (),
        tenant: str = "",
    ) -> SequenceSampling:
        """Return the sampling state of a new sequence. Its grammar is compiled while it waits.

        Args:
            prompt: the request's token ids.
            default_seed: used together with the request's id if the request has no seed.
            output: tokens that another engine has chosen already; see `SequenceSampling.resume`.
            tenant: owner of the request; see `Grammars.start`.

        Raises:
            SamplingError: a token id is outside the vocabulary, or ``output`` cannot go on.
            GrammarError: grammars are not offered, or this one is known to be bad at once.
        """
        matcher = None
        if params.grammar is not None:
            if self._grammars is None:
                raise GrammarError("this model is served without support for structured output")
            matcher = self._grammars.start(params.grammar, tenant)
        sampling = SequenceSampling(
            prompt,
            params,
            eos_token_ids,
            vocab_size=self._vocab_size,
            key=seed_key(params.seed, default_seed=default_seed, request_id=request_id),
            grammar=matcher,
        )
        try:
            sampling.resume(output)
        except SamplingError:
            sampling.close()
            raise
        if matcher is not None and self._grammars is not None:
            self._grammars.open(matcher)
        return sampling

    def close(self) -> None:
        """End the processes that follow grammars."""
        if self._grammars is not None:
            self._grammars.close()

    def poll(self) -> None:
        """Take what has come of grammars that were late; never waits."""
        if self._grammars is not None:
            self._grammars.poll()

    def sample(self, logits: torch.Tensor, sequences: Sequence[SequenceSampling]) -> list[Sampled]:
        """Choose the next token of each sequence and advance its state.

        The token of a sequence depends on its own row and state only. An error of one row is in
        its ``Sampled.error`` and does not affect the others.

        Args:
            logits: (n, vocab) float32 or bfloat16; not changed.
            sequences: one for each row, each at most once.

        Raises:
            ValueError: the shape does not fit.
        """
        choice = self.choose(logits, sequences)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return self.accept(choice)

    def choose(self, logits: torch.Tensor, sequences: Sequence[SequenceSampling]) -> TokenChoice:
        """Enqueue the choice of a token for each sequence, and leave their state as it is.

        The host waits for the device only if a sequence wants log probabilities. Arguments and
        errors are those of `sample`.
        """
        if logits.shape != (len(sequences), self._vocab_size):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} for {len(sequences)} sequences and a "
                f"vocabulary of {self._vocab_size}"
            )
        if not sequences:
            nothing = torch.empty(0, dtype=torch.int64)
            return TokenChoice(sequences, nothing, nothing, {})
        rows = self._choose_rows(logits, sequences)
        return TokenChoice(sequences, rows.chosen, to_host(rows.chosen), rows.logprobs, rows.faults)

    def accept(self, choice: TokenChoice, last: Collection[int] = ()) -> list[Sampled]:
        """Advance each sequence by its token; the device must have finished the choice.

        Args:
            last: rows that end with this token anyway; see `SequenceSampling.settle`. For their
                grammars a few milliseconds are waited at most.
        """
        tokens = choice.tokens.tolist()
        faults = dict(choice.faults)
        for row, (token, sequence) in enumerate(zip(tokens, choice.sequences, strict=True)):
            if token >= 0:
                try:
                    sequence.propose(token, choice.logprobs.get(row))
                except NOT_OF_ONE_REQUEST:
                    raise
                except Exception as error:
                    faults[row] = _fault(error)
        self._settle_grammars(choice.sequences, last, faults)
        return [
            self._result(row, token, sequence, row in last, faults)
            for row, (token, sequence) in enumerate(zip(tokens, choice.sequences, strict=True))
        ]

    def _choose_rows(self, logits: torch.Tensor, sequences: Sequence[SequenceSampling]) -> _Rows:
        """Choose for all rows at once, or for halves of them if that raises an exception.

        So each row that raises one by itself fails alone. The others get the same tokens as
        without it, because a token depends on its own row and sequence only.
        """
        try:
            return self._choose_together(logits, sequences)
        except NOT_OF_ONE_REQUEST:
            raise
        except Exception as error:
            if len(sequences) == 1:
                code = torch.full((1,), RAISED, dtype=torch.int64, device=self._device)
                return _Rows(code, {}, {0: _fault(error)})
        half = len(sequences) // 2
        first = self._choose_rows(logits[:half], sequences[:half])
        return first.followed_by(self._choose_rows(logits[half:], sequences[half:]))

    def _choose_together(
        self, logits: torch.Tensor, sequences: Sequence[SequenceSampling]
    ) -> _Rows:
        top, tokens = row_max(logits)
        tokens = torch.where(top.isfinite(), tokens, NOT_FINITE)
        special = [row for row, sequence in enumerate(sequences) if not sequence.plain]
        if special:
            index = to_device(special, self._device)
            chosen = self._choose(
                logits.index_select(0, index).float(),
                tokens[index],
                [sequences[row] for row in special],
            )
            tokens[index] = chosen
        return _Rows(tokens, self._logprobs(logits, tokens, sequences), {})

    def _settle_grammars(
        self,
        sequences: Sequence[SequenceSampling],
        last: Collection[int],
        faults: dict[int, str],
    ) -> None:
        """Send grammars their tokens, and wait for those of the ``last`` rows; see `accept`."""
        if self._grammars is None:
            return
        moved: dict[int, GrammarFollower] = {}
        for row in last:
            follower = sequences[row].grammar
            if follower is not None and sequences[row].chosen and row not in faults:
                moved[row] = follower
        if not moved:
            self._grammars.poll()
            return
        try:
            self._grammars.settle(list(moved.values()))
        except Exception:
            log.exception("grammars could not be followed together; each is tried alone")
            for row, follower in moved.items():
                try:
                    self._grammars.settle([follower])
                except Exception as error:
                    faults[row] = _fault(error)

    def _result(
        self,
        row: int,
        token: int,
        sequence: SequenceSampling,
        last: bool,
        faults: dict[int, str],
    ) -> Sampled:
        """Return what came of one row, whose grammar has answered or is late."""
        if row not in faults:
            try:
                if sequence.chosen:
                    return sequence.settle(last=last)
                if token in WITHOUT_ERROR:
                    return WITHOUT_ERROR[token]
                return self._failed(token, sequence)
            except NOT_OF_ONE_REQUEST:
                raise
            except Exception as error:
                faults[row] = _fault(error)
        return Sampled(-1, error=faults[row], of_request=True)

    def _choose(
        self, logits: torch.Tensor, tokens: torch.Tensor, sequences: Sequence[SequenceSampling]
    ) -> torch.Tensor:
        """Return tokens or error codes (n,) for rows that need more than an argmax.

        Overwrites ``logits``.
        """
        # Rows that are not finite are computed like the others and get their error code at the end.
        broken = tokens == NOT_FINITE
        late = self._apply_grammars(logits, sequences)
        ended = [row for row, sequence in enumerate(sequences) if sequence.ended]
        self._apply_adjustments(logits, sequences)
        peak, chosen = row_max(logits)
        usable = peak.isfinite()
        random = [row for row, sequence in enumerate(sequences) if not sequence.greedy]
        if random:
            index = to_device(random, logits.device)
            chosen[index] = draw(
                logits.index_select(0, index),
                peak[index],
                [sequences[row].params for row in random],
                [sequences[row].uniform() for row in random],
            )
        chosen = torch.where(usable, chosen, NOTHING_LEFT)
        chosen = torch.where(broken, NOT_FINITE, chosen)
        for code, found in ((NOT_READY, late), (ENDED, ended)):
            if found:
                chosen[to_device(found, logits.device)] = code
        return chosen

    def _apply_grammars(
        self, logits: torch.Tensor, sequences: Sequence[SequenceSampling]
    ) -> list[int]:
        """Forbid what grammars do not allow; returns the rows whose mask is not there."""
        rows = {row: s.grammar for row, s in enumerate(sequences) if s.grammar is not None}
        if not rows or self._grammars is None:
            return []
        asked = [one for row, one in rows.items() if not sequences[row].chosen]
        self._grammars.prepare(asked)
        late = [row for row, one in rows.items() if sequences[row].chosen or not one.ready]
        ready: dict[int, GrammarFollower] = {r: one for r, one in rows.items() if r not in late}
        if ready:
            masks = self._grammars.masks(list(ready.values()))
            forbid(logits, to_device(list(ready), logits.device), masks)
        return late

    def _apply_adjustments(
        self, logits: torch.Tensor, sequences: Sequence[SequenceSampling]
    ) -> None:
        additions: list[tuple[int, Additions]] = []
        for row, sequence in enumerate(sequences):
            if forbidden := sequence.forbidden():
                additions.append((row, forbidden))
            if sequence.bias is not None:
                additions.append((row, sequence.bias))
        if additions:
            add_to_logits(logits, additions)
        penalties = [(row, s.penalties) for row, s in enumerate(sequences) if s.penalties]
        if penalties:
            penalise(logits, penalties)

    def _logprobs(
        self, logits: torch.Tensor, tokens: torch.Tensor, sequences: Sequence[SequenceSampling]
    ) -> dict[int, TokenLogprob]:
        rows = [row for row, s in enumerate(sequences) if s.params.logprobs is not None]
        if not rows:
            return {}
        index = to_device(rows, self._device)
        tops = [sequences[row].params.logprobs or 0 for row in rows]
        found = token_logprobs(
            logits.index_select(0, index).float(), tokens[index].clamp(min=0), tops
        )
        return dict(zip(rows, found, strict=True))

    @staticmethod
    def _failed(code: int, sequence: SequenceSampling) -> Sampled:
        grammar = sequence.grammar
        if code == NOTHING_LEFT and grammar is not None and grammar.error is not None:
            return Sampled(-1, error=grammar.error, of_request=True)
        return Sampled(-1, error=ERRORS[code], of_request=code == NOTHING_LEFT)


def _fault(error: Exception) -> str:
    """Log an exception that belongs to one row, and return the message for its client."""
    log.error("choosing a token failed for one request", exc_info=error)
    return (
        f"no token could be chosen with the parameters of this request ({type(error).__name__}); "
        "the log of the engine says more"
    )
