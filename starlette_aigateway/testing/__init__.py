"""For tests of hosts and of whoever writes a provider or a store: contract suites, scripted providers, a clock that stands still.

A contract suite is a class whose tests take the store from a fixture that a subclass provides (each says which), so that a store of
your own is held to what the gateway relies on. It needs pytest with anyio's plugin: mark the subclass with `pytest.mark.anyio`.
"""

from .audit import AuditStoreContract
from .cache import ResponseCacheContract, SharedResponseCacheContract
from .client import ASGIClient, WholeAnswer
from .clock import FakeClock
from .exchange import Exchange, ServerSentEvent
from .idempotency import IdempotencyContract
from .keys import KeyStoreContract
from .ledger import LedgerContract
from .overriding import Override, override
from .prices import PriceStoreContract
from .prompts import PromptStoreContract
from .provider_contract import ProviderContract, Stuck
from .providers import After, Die, Hang, Say, ScriptedProvider
from .recording import Recorded, RecordedCall
from .tenants import TenantStoreContract
from .transport import TransportContract
from .windows import LimitsContract, WindowsContract

__all__ = [
    "ASGIClient",
    "After",
    "AuditStoreContract",
    "Die",
    "Exchange",
    "FakeClock",
    "Hang",
    "IdempotencyContract",
    "KeyStoreContract",
    "LedgerContract",
    "LimitsContract",
    "Override",
    "PriceStoreContract",
    "PromptStoreContract",
    "ProviderContract",
    "Recorded",
    "RecordedCall",
    "ResponseCacheContract",
    "Say",
    "ScriptedProvider",
    "ServerSentEvent",
    "SharedResponseCacheContract",
    "Stuck",
    "TenantStoreContract",
    "TransportContract",
    "WholeAnswer",
    "WindowsContract",
    "override",
]
