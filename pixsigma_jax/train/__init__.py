"""Training: joins data, network, mathematics and mesh into a run that resumes."""
