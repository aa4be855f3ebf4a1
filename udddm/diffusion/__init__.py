"""The diffusion process: noise schedules, preconditioning, and samplers."""
