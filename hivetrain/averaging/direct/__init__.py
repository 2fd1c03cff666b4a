"""Direct links between peers: plain sockets with TLS 1.3, authenticated by libp2p identities (docs/exchange.md)."""
