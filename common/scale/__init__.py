"""Several engines behind one address, and batches over several, on Ray; needs the extra `scale`.

Serve's HTTP proxy -> `front`: reads a request -> `router`: chooses by `prefixes` -> `replica`: an engine behind the
server's application. The front exists because the proxy shows a router no body, and beginnings are in the body."""
