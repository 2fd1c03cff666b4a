"""A node in a box: the SDK's Substrate interface over a ledger file, with faults to order."""

import asyncio
import time

import bittensor as bt
from bittensor._transport.errors import StorageFunctionNotFound

from hivetrain.chain.base import Code, Deadline, LedgerError
from hivetrain.chain.ledger import Ledger

NETUID = 7
RAO = 10**9
NAMES = {
    Code.NOT_REGISTERED: "HotKeyNotRegisteredInSubNet",
    Code.RATE_LIMITED: "SettingWeightsTooFast",
    Code.NO_PERMIT: "NeuronNoValidatorPermit",
    Code.LOW_STAKE: "NotEnoughStakeToSetWeights",
    Code.STALE_VERSION: "IncorrectWeightVersionKey",
    Code.INVALID_WEIGHTS: "WeightVecLengthIsLow",
    Code.INVALID_ENDPOINT: "InvalidIpAddress",
    Code.CLOSED: "SubNetRegistrationDisabled",
    Code.FULL: "NoNeuronIdAvailable",
    Code.FUNDS: "NotEnoughBalanceToStake",
}


class Faults:
    """What goes wrong, shared by all connections of a test.

    The moments are ``connect``, ``read``, ``before_submit`` and ``after_submit``; a fault is an exception, the word
    "silence" or, for the last two, a result to hand out. It happens ``times`` times.
    """

    def __init__(self):
        self.what = {}
        self.connects = 0
        self.submits = 0

    def order(self, moment, fault, times=10**9):
        self.what[moment] = [fault, times]

    async def meet(self, moment):
        fault = self.what.get(moment)
        if not fault or fault[1] <= 0:
            return None
        fault[1] -= 1
        if fault[0] == "silence":
            await asyncio.Event().wait()
        if isinstance(fault[0], Exception):
            raise fault[0]
        return fault[0]


class FakeSubstrate:
    def __init__(self, path, faults=None):
        self.ledger = Ledger(path)
        self.faults = faults or Faults()
        self.token_symbols = {}
        self.mode = "Yuma"

    def deadline(self):
        return Deadline(5, time.monotonic)

    def balance(self, rao, netuid=0):
        return bt.Balance.from_rao(rao, netuid) if netuid else bt.Balance.from_rao(rao)

    async def connect(self):
        self.faults.connects += 1
        await self.faults.meet("connect")

    async def close(self):
        self.ledger.close()

    async def block_number(self):
        await self.faults.meet("read")
        return self.ledger.clock(self.deadline())[0]

    async def block_hash(self, block=None):
        await self.faults.meet("read")
        return self.ledger.block_hash(await self.block_number() if block is None else block, self.deadline())

    async def block_time(self):
        return 0.25

    async def query(self, module, item, params=None, block_hash=None):
        await self.faults.meet("read")
        assert module == "SubtensorModule"
        if params and params[0] != NETUID and item != "StakeThreshold":
            return None
        view = self.ledger.snapshot(self.deadline())
        if item == "Uids":
            neuron = view.neuron(params[1])
            return None if neuron is None else neuron.uid
        values = {
            "LastUpdate": lambda: [neuron.last_update for neuron in view.neurons],
            "ValidatorPermit": lambda: [neuron.permit for neuron in view.neurons],
            **{name: (lambda value=value: value) for name, value in self.rules(view).items()},
        }
        if item not in values:
            raise StorageFunctionNotFound(f"Storage function {module}.{item} not found")
        return values[item]()

    def rules(self, view):
        rules = view.rules
        return {
            "Tempo": rules.tempo,
            "MaxAllowedUids": rules.max_uids,
            "ImmunityPeriod": rules.immunity_period,
            "MinNonImmuneUids": rules.min_non_immune,
            "WeightsSetRateLimit": rules.rate_limit,
            "ActivityCutoffFactorMilli": rules.activity_cutoff * 1000 // rules.tempo,
            "MaxAllowedValidators": rules.max_validators,
            "MinAllowedWeights": rules.min_weights,
            "MaxWeightsLimit": int(rules.max_weight_share * 65535),
            "WeightsVersionKey": rules.version_key,
            "CommitRevealWeightsEnabled": rules.commit_reveal,
            "RevealPeriodEpochs": rules.reveal_period,
            "Kappa": 32767,
            "BondsMovingAverage": 900_000,
            "BondsPenalty": 65535,
            "SubnetEpochConsensus": self.mode,
            "NetworkRegistrationAllowed": rules.registration_open,
            "Burn": int(rules.registration_cost * RAO),
            "StakeThreshold": int(rules.stake_threshold * RAO),
            "LastEpochBlock": view.next_epoch - rules.tempo,
            "PendingEpochAt": 0,
            "SubnetEpochIndex": view.block // rules.tempo,
            "BlocksSinceLastStep": view.block % rules.tempo,
        }

    async def query_map(self, module, item, params=None, block_hash=None):
        assert (module, item) == ("SubtensorModule", "Weights")
        uids = {neuron.hotkey: neuron.uid for neuron in self.ledger.snapshot(self.deadline()).neurons}
        rows = self.ledger.weights(self.deadline())
        return [
            (uids[validator], [(uids[miner], round(share * 65535)) for miner, share in row.items()])
            for validator, row in rows.items()
        ]

    async def runtime_call(self, api, method, params, block_hash=None):
        await self.faults.meet("read")
        view = self.ledger.snapshot(self.deadline())
        if method == "get_next_epoch_start_block":
            return view.next_epoch
        assert method == "get_metagraph"
        if params != [NETUID]:
            return None
        neurons = view.neurons
        return {
            "netuid": NETUID,
            "block": view.block,
            "tempo": view.tempo,
            "last_step": 0,
            "blocks_since_last_step": 0,
            "owner_hotkey": view.rules.owner or "",
            "owner_coldkey": "",
            "network_registered_at": 0,
            "hotkeys": [neuron.hotkey for neuron in neurons],
            "coldkeys": ["" for _ in neurons],
            "active": [neuron.active for neuron in neurons],
            "validator_permit": [neuron.permit for neuron in neurons],
            "last_update": [neuron.last_update for neuron in neurons],
            "block_at_registration": [neuron.registered_at for neuron in neurons],
            "incentives": [round(neuron.incentive * 65535) for neuron in neurons],
            "dividends": [round(neuron.dividends * 65535) for neuron in neurons],
            "emission": [round(neuron.emission * RAO) for neuron in neurons],
            "total_stake": [round(neuron.stake * RAO) for neuron in neurons],
            "axons": [_axon(neuron) for neuron in neurons],
        }

    async def compose(self, call):
        return call

    async def estimate_fee(self, call, keypair):
        return bt.Balance.from_rao(1000)

    async def submit(self, call, keypair, **_options):
        self.faults.submits += 1
        ordered = await self.faults.meet("before_submit")
        if ordered is not None:
            return ordered
        try:
            receipt = self.dispatch(call, keypair.ss58_address)
        except LedgerError as error:
            chain_error = bt.ChainError(error.message, NAMES[error.code])
            return bt.ExtrinsicResult(success=False, message=error.message, error=chain_error)
        ordered = await self.faults.meet("after_submit")
        if ordered is not None:
            return ordered
        return bt.ExtrinsicResult(success=True, message="Success", extrinsic_id=f"{receipt.block}-0001")

    def dispatch(self, call, signer):
        _module, function, params = call
        view = self.ledger.snapshot(self.deadline())
        if function == "serve_axon":
            ip = _ip(params["ip"], params["ip_type"])
            return self.ledger.publish(signer, ip, params["port"], self.deadline())
        if function == "register_limit":
            if view.rules.registration_cost * RAO > params["limit_price"]:
                raise LedgerError(Code.FUNDS, "price above the limit")
            self.ledger.set_funds(params["hotkey"], view.rules.registration_cost, self.deadline())
            return self.ledger.register(params["hotkey"], self.deadline())
        hotkeys = {neuron.uid: neuron.hotkey for neuron in view.neurons}
        if function == "commit_timelocked_mechanism_weights":
            # Sealed to a round of drand that nobody here can open: an even row stands in for it.
            return self.ledger.submit_weights(signer, dict.fromkeys(hotkeys.values(), 1.0), 10**9, self.deadline())
        assert function == "set_mechanism_weights"
        weights = {hotkeys[uid]: float(value) for uid, value in zip(params["dests"], params["weights"], strict=True)}
        return self.ledger.submit_weights(signer, weights, params["version_key"], self.deadline())


def _axon(neuron):
    import ipaddress

    if neuron.ip is None:
        return {"ip": 0, "port": 0, "ip_type": 4}
    address = ipaddress.ip_address(neuron.ip)
    return {"ip": int(address), "port": neuron.port, "ip_type": address.version}


def _ip(number, version):
    import ipaddress

    return str((ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address)(number))
