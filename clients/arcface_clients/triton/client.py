"""What all clients share, plain and asyncio: arguments, what is known of the served model, and their refusals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from arcface_clients.errors import ConfigError
from arcface_clients.triton.address import Address, Tls
from arcface_clients.triton.memory.choice import SharedMemory, SharedMemoryOption
from arcface_clients.triton.options import ClientOptions
from arcface_clients.triton.served import ServedModel
from arcface_clients.triton.session import Session

STREAM_RETRY_FOR_S = 120.0  # a server that is restarted loads its models again, which takes a while


class ServerClient(ABC):
    """One model on one server. The arguments are the fields of `ClientOptions`, which says what each means.

    Attributes:
        options: the arguments.
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        model: str = "arcface",
        *,
        timeout_s: float = 120.0,
        total_timeout_s: float | None = None,
        retry_for_s: float = 5.0,
        in_flight: int = 4,
        expected_contract: str | None = None,
        shared_memory: SharedMemoryOption = "auto",
        compression: str | None = None,
        headers: Mapping[str, str] | None = None,
        tls: Tls | None = None,
    ) -> None:
        """Check the arguments; nothing is sent yet."""
        self.options = ClientOptions(
            url=url,
            model=model,
            timeout_s=timeout_s,
            total_timeout_s=total_timeout_s,
            retry_for_s=retry_for_s,
            in_flight=in_flight,
            expected_contract=expected_contract,
            shared_memory=shared_memory,
            compression=compression,
            headers={} if headers is None else headers,
            tls=tls or Tls(),
        )
        self.options.tls.check_files()
        self._set_up()

    @abstractmethod
    def _set_up(self) -> None:
        """Prepare what the kind of client opens later."""

    @property
    def address(self) -> Address:
        """Where the server answers."""
        return self.options.address

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its arguments: it arrives in another process as a client of its own, not connected yet."""
        return _made_again, (type(self), self._arguments())

    def __repr__(self) -> str:
        """URL and model."""
        return f"{type(self).__name__}({str(self.address)!r}, model={self.options.model!r})"

    def _arguments(self) -> dict[str, Any]:
        """What it was made with."""
        return dict(vars(self.options))


class TritonClient(ServerClient):
    """A client that sends faces."""

    takes_gpu_faces = True

    def _set_up(self) -> None:
        self._session = Session(self.options)

    @property
    @abstractmethod
    def served(self) -> ServedModel:
        """What the server says of the model."""

    @property
    def embedding_dim(self) -> int:
        """D, the width of an embedding."""
        return self.served.embedding_dim or self._session.embedding_dim

    @property
    def contract_id(self) -> str | None:
        """The served embedding contract; None when Triton was started without the import's overlay."""
        return self.served.contract_id

    @property
    def contract_prefix(self) -> str | None:
        """The first 32 digits of the contract id, as every answer has to name it; never connects.

        None: nothing was asked yet, or the model does not name its contract. Where Triton was started without the
        import's overlay, `contract_id` is None and this is known from the first answer.
        """
        return self._session.contract_prefix

    @property
    def max_batch_size(self) -> int:
        """The most faces that go into one request."""
        return self.served.max_batch_size

    @property
    def shared_memory(self) -> SharedMemory:
        """Whether faces go through shared memory, and why; never connects."""
        return self._session.regions.chosen

    @property
    def gpu_shared_memory(self) -> SharedMemory | None:
        """The same for faces on a GPU; None before the first ones came."""
        return self._session.regions.chosen_for_gpu

    def _stream_size(self, served: ServedModel, batch_size: int | None) -> int:
        """Faces in a full request of a stream.

        Raises:
            ConfigError: the server takes no such batch.
        """
        size = served.max_batch_size if batch_size is None else batch_size
        if not isinstance(size, Integral) or not 1 <= size <= served.max_batch_size:
            raise ConfigError(
                f"batch_size is {size!r}; expected 1..{served.max_batch_size}, the server's max_batch_size."
            )
        return size


def _made_again(kind: type[ServerClient], arguments: dict[str, Any]) -> ServerClient:
    return kind(**arguments)
