"""HTTP/1.1 as a client, on asyncio: llhttp parses, asyncio speaks to the socket. Imported where `[fast]` is installed."""
