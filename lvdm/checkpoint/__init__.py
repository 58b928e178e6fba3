"""Checkpoints on disk and in stores: the format, verified reading, complete-or-absent writing. Needs no DeepSpeed.

    checkpoints/                     a folder or any fsspec URL (`folder`)
      latest                         name of the newest verified checkpoint
      best                           name of the one with the best validation, where there is validation
      step-00000100/
        rank-00000.safetensors       this rank's pieces of the state (`pieces`)
        rank-00001.safetensors
        manifest.json                written last: what there is, with a checksum for every 4 MiB (`manifest`, `blocks`)

Reading is `reader.Checkpoint`; writing is done by a process beside the ranks of each node (`node_writer`), which
`lvdm.engine.saving` feeds.
"""
