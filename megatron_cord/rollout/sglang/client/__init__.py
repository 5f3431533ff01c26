"""HTTP to SGLang servers: addresses, requests and replies, and the servers' states on one rank."""
