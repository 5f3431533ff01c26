"""HTTP to SGLang servers: addresses, requests and replies, and the servers' state as one rank sees it."""
