"""What takes an artifact to where it runs: a bundle for one machine, a model repository for a server."""
