"""Drop-in replacements: the peers' signatures and semantics on the fused operators.

Nothing here is imported by ``import voxfuse``, and none of the peers is needed.
``docs/differences.md`` says where the numbers differ from theirs, and why.

>>> from voxfuse.integrations.monai import DiceCELoss
>>> DiceCELoss(softmax=True, to_onehot_y=True).lambda_ce
1.0
"""
