"""What media may be fetched from where, and how much of everything it may take."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from renderer.addresses import AddressRules

MIB = 1024 * 1024

HostPattern = Annotated[str, StringConstraints(to_lower=True, pattern=r"(?i)^\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Network = IPv4Network | IPv6Network


class FetchConfig(BaseModel):
    """Fetching of media. Unknown fields are refused. Sizes are in bytes, times in seconds. How large one item may be
    is the renderer's `max_image_bytes`, however it comes.

    Hosts are written as they go over the network (`xn--bcher-kva.example`), one with a leading dot for every name
    below it. Networks are CIDRs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schemes: frozenset[Literal["http", "https"]] = frozenset({"http", "https"})
    hosts: tuple[HostPattern, ...] | None = Field(None, description="The only ones that are fetched from; None: any.")
    ports: frozenset[Port] | None = Field(None, description="The only ones that are connected to; None: any.")
    internal_hosts: tuple[HostPattern, ...] = Field(
        (), description="Their names may lead to addresses that are not public; to metadata services never."
    )
    internal_networks: tuple[Network, ...] = Field((), description="Connected to, public or not.")
    denied_networks: tuple[Network, ...] = Field(
        (), description="Never connected to: the cluster's own public addresses, a NAT64 prefix of one's own."
    )
    file_root: Path | None = Field(None, description="`file:` URLs are read below it; None: they are refused.")
    ca_file: Path | None = Field(None, description="PEM certificates trusted beside certifi's.")
    user_agent: str = Field("greenroom", pattern=r"^[\x21-\x7e]+( [\x21-\x7e]+)*$")

    max_request_bytes: int = Field(256 * MIB, ge=1, description="Of all items that one request has fetched.")
    max_held_bytes: int = Field(
        1024 * MIB, ge=1, description="Of what all requests have fetched and not yet done with; others get a 503."
    )
    min_bytes_per_s: int = Field(1024, ge=0, description="Of a body, on average, once it has taken `idle_s`.")
    connect_s: float = Field(3.0, gt=0, description="For look-up and connection; again for the TLS handshake.")
    idle_s: float = Field(5.0, gt=0, description="Between two pieces of an answer.")
    total_s: float = Field(15.0, gt=0, description="For one item: redirects, retries and all. As long for its turn.")
    max_redirects: int = Field(5, ge=0)
    retries: int = Field(2, ge=0, description="After failed connections and 5xx answers, over all of one item.")
    backoff_s: float = Field(0.1, ge=0, description="Before the first retry; doubled for each further one.")
    max_fetches: int = Field(32, ge=1, description="Items under way at the same time.")
    max_fetches_per_request: int = Field(8, ge=1)
    keepalive_s: float = Field(5.0, ge=0, description="How long an idle connection is kept.")

    @property
    def address_rules(self) -> AddressRules:
        return AddressRules(self.internal_hosts, self.internal_networks, self.denied_networks)
