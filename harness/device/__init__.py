"""One device in use: session, lease, deployment, probe, collected results."""
