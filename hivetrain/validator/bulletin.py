"""Publishes a validator's scores in the DHT, for whoever watches the run; nothing depends on them."""

import logging
import time
from collections.abc import Callable, Mapping

from hivetrain.contribution.record import hotkey_subkey
from hivetrain.contribution.scoreboard import scoreboard, seal_scoreboard
from hivetrain.keys import Hotkey
from hivetrain.scoring import TempoScore
from hivetrain.validator.run import SwarmFault
from hivetrain.validator.watch import ValidatorWatcher

logger = logging.getLogger(__name__)

_MAX_LIFETIME_S = 6 * 3600.0


class Bulletin(ValidatorWatcher):
    """Seals and stores a scoreboard after each tempo.

    Args:
        run_id: of the run.
        hotkey: the validator's.
        store: stores a record under a DHT key and subkey until it expires; raises SwarmFault.
        lifetime_s: seconds that a scoreboard is to be seen, some tempos.
    """

    def __init__(
        self, run_id: str, hotkey: Hotkey, store: Callable[[str, bytes, bytes, float], bool], lifetime_s: float
    ) -> None:
        self._run_id, self._hotkey, self._store = run_id, hotkey, store
        self._lifetime_s = min(max(60.0, lifetime_s), _MAX_LIFETIME_S)

    def scored(
        self,
        block: int,
        scores: Mapping[str, TempoScore],
        averages: Mapping[str, float],
        weights: Mapping[str, float],
        reasons: Mapping[str, str],
    ) -> None:
        board = scoreboard(self._run_id, self._hotkey.address, block, scores, averages, weights, reasons)
        expires = time.time() + self._lifetime_s - 1  # DHT time is the time since 1970
        try:
            for key, sealed in seal_scoreboard(board, self._hotkey, expires):
                if not self._store(key, hotkey_subkey(self._hotkey.address), sealed, expires):
                    logger.warning("the DHT did not take the scores of tempo %d", block)
        except SwarmFault as error:
            logger.warning("the scores of tempo %d are not published: %s", block, error)
