"""Bittensor's answers in this project's words: error names to codes, storage values to rules.

Surprising fact: a transaction that failed is an ordinary answer there, not an exception, and one that was refused by
the pool carries a sentence but no error name.
"""

from collections.abc import Mapping
from typing import Any

from hivetrain.chain.base import Code, LedgerError, Neuron, Rules
from hivetrain.chain.weights import U16_MAX

RAO = 10**9
MILLION = 10**6

# Storage items of pallet SubtensorModule that make the rules of a subnet; all but the last take the netuid.
RULE_ITEMS = (
    "Tempo",
    "MaxAllowedUids",
    "ImmunityPeriod",
    "MinNonImmuneUids",
    "WeightsSetRateLimit",
    "ActivityCutoffFactorMilli",
    "MaxAllowedValidators",
    "MinAllowedWeights",
    "MaxWeightsLimit",
    "WeightsVersionKey",
    "CommitRevealWeightsEnabled",
    "RevealPeriodEpochs",
    "Kappa",
    "BondsMovingAverage",
    "BondsPenalty",
    "SubnetEpochConsensus",
    "NetworkRegistrationAllowed",
    "Burn",
    "StakeThreshold",
)

_BY_NAME = {
    "NeuronNoValidatorPermit": Code.NO_PERMIT,
    "NotEnoughStakeToSetWeights": Code.LOW_STAKE,
    "StakeAmountTooLow": Code.LOW_STAKE,
    "IncorrectWeightVersionKey": Code.STALE_VERSION,
    "DuplicateUids": Code.INVALID_WEIGHTS,
    "UidVecContainInvalidOne": Code.INVALID_WEIGHTS,
    "UidsLengthExceedUidsInSubNet": Code.INVALID_WEIGHTS,
    "WeightVecLengthIsLow": Code.INVALID_WEIGHTS,
    "WeightVecNotEqualSize": Code.INVALID_WEIGHTS,
    "InputLengthsUnequal": Code.INVALID_WEIGHTS,
    "MaxWeightExceeded": Code.INVALID_WEIGHTS,
    "InvalidIpType": Code.INVALID_ENDPOINT,
    "InvalidIpAddress": Code.INVALID_ENDPOINT,
    "InvalidPort": Code.INVALID_ENDPOINT,
    "NoNeuronIdAvailable": Code.FULL,
    "RegistrationPriceLimitExceeded": Code.FUNDS,
    "SubnetNotExists": Code.INCOMPATIBLE,
}
_BY_KIND = {
    "not_registered": Code.NOT_REGISTERED,
    "rate_limited": Code.RATE_LIMITED,
    "insufficient_balance": Code.FUNDS,
    "disabled": Code.CLOSED,
    "subtoken_disabled": Code.CLOSED,
}


def code_of(name: str | None, kind: str) -> Code:
    """The code of a named chain error and of the SDK's class of errors it belongs to.

    What nobody foresaw is INCOMPATIBLE: repeating it unchanged would fail again.
    """
    return _BY_NAME.get(name or "") or _BY_KIND.get(kind, Code.INCOMPATIBLE)


def rules_from_storage(values: Mapping[str, Any]) -> Rules:
    """The rules of a subnet from the storage items of ``RULE_ITEMS``.

    Raises:
        LedgerError: INCOMPATIBLE when the runtime keeps them in a form that is not known here.
    """
    missing = [name for name in RULE_ITEMS if values.get(name) is None]
    if missing:
        raise LedgerError(Code.INCOMPATIBLE, f"the runtime has no value for {', '.join(missing)}")
    tempo = max(1, int(values["Tempo"]))
    return Rules(
        tempo=tempo,
        max_uids=int(values["MaxAllowedUids"]),
        immunity_period=int(values["ImmunityPeriod"]),
        min_non_immune=int(values["MinNonImmuneUids"]),
        rate_limit=int(values["WeightsSetRateLimit"]),
        activity_cutoff=int(values["ActivityCutoffFactorMilli"]) * tempo // 1000,
        stake_threshold=int(values["StakeThreshold"]) / RAO,
        max_validators=int(values["MaxAllowedValidators"]),
        min_weights=max(1, int(values["MinAllowedWeights"])),
        max_weight_share=int(values["MaxWeightsLimit"]) / U16_MAX,
        version_key=int(values["WeightsVersionKey"]),
        commit_reveal=bool(values["CommitRevealWeightsEnabled"]),
        reveal_period=max(1, int(values["RevealPeriodEpochs"])),
        kappa=int(values["Kappa"]) / U16_MAX,
        bonds_alpha=1 - int(values["BondsMovingAverage"]) / MILLION,
        bonds_beta=int(values["BondsPenalty"]) / U16_MAX,
        consensus=_consensus(values["SubnetEpochConsensus"]),
        registration_open=bool(values["NetworkRegistrationAllowed"]),
        registration_cost=int(values["Burn"]) / RAO,
        owner=values.get("owner"),
        block_time_s=float(values.get("block_time", 12.0)),
    )


def neuron_from_metagraph(row: Any) -> Neuron:
    """One row of the SDK's metagraph. Its rank and trust are no longer stored by the chain and not used."""
    ip, port = None, None
    if row.axon:
        host, _, text = row.axon.rpartition(":")
        ip, port = host.strip("[]"), int(text)
    return Neuron(
        uid=int(row.uid),
        hotkey=str(row.hotkey),
        stake=int(row.total_stake.rao) / RAO,
        active=bool(row.active),
        permit=bool(row.validator_permit),
        last_update=int(row.last_update),
        registered_at=int(row.block_at_registration),
        incentive=float(row.incentive),
        dividends=float(row.dividends),
        emission=int(row.emission.rao) / RAO,
        ip=ip,
        port=port,
    )


def _consensus(mode: Any) -> str:
    """``yuma`` or ``null``; a runtime may answer with a name, a one-key mapping or a number."""
    name = next(iter(mode), None) if isinstance(mode, dict) else mode
    known = {"Yuma": "yuma", "Null": "null", 0: "yuma", 1: "null"}
    if not isinstance(name, (str, int)) or name not in known:
        raise LedgerError(Code.INCOMPATIBLE, f"the subnet runs consensus {str(mode)[:60]!r}, which is not known here")
    return known[name]
