"""The diffusion process: variance schedules, the fp32 border around the network, the training loss, guidance, samplers.

All noise arithmetic happens here, in fp32 or better; the network is the only low-precision part and is reached through
`denoiser.Denoiser` alone. Latents are ``z_BCTHW``. A time ``t_B`` is an integer step of the schedule, or, for rectified
flow (``parameterization: flow``), a float fraction in [0, 1] with 0 clean and 1 pure noise. A sampler never sees the
network's parameterisation: it is given a `samplers.Denoise`, which maps ``(z_t, t)`` to the clean latent's estimate.
"""
