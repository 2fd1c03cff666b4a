"""The dashboard: a page that shows a run to anybody, read off the DHT and the chain."""
