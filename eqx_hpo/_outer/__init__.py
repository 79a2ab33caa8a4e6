from .anchor import anchor as anchor
from .constrain import mirror as mirror, project as project
from .gate import gate as gate
from .proximal import (
    AbstractPenalty as AbstractPenalty,
    Box as Box,
    ElasticNet as ElasticNet,
    GroupLasso as GroupLasso,
    L1 as L1,
    proximal as proximal,
)
from .select import select_top_k as select_top_k
from .update import outer_update as outer_update
