"""For authors of plugins: test servers, the fault proxy and the conformance kit. Nothing of the service uses it."""
