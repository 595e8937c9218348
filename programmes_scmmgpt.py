"""Published short lists of genes: programmes that a cell may express, and genes of one lineage.

Descriptions of cells (`proof_scmmgpt`) and searches (`query_scmmgpt`) use these lists.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Programme:
    """A short published list of genes that rise together in a state of a cell.

    Args:
        phrase: Name of the state; the clause of a description starts with the phrase.
        genes: Symbols; no gene is in two lists.
        source: Publication of the list, or of the longer list that these genes are taken from.
        words: Other names of the state, for searches.
        within: Cell Ontology ids of the types in which the state is meaningful; empty for all types.
    """

    phrase: str
    genes: tuple[str, ...]
    source: str
    words: tuple[str, ...]
    within: tuple[str, ...] = ()


T_AND_NK = ("CL:0000084", "CL:0000623", "CL:0000791")
PROGRAMMES = (
    Programme(
        "Cell cycle",
        tuple(
            "PCNA TYMS MCM2 MCM6 RRM1 RRM2 UHRF1 GMNN CDC6 CDC45 GINS2 HELLS CLSPN MKI67 TOP2A CDK1 UBE2C BIRC5 TPX2 "
            "NUSAP1 CENPF CCNB2 AURKB BUB1 KIF11 CDC20 CENPE HMMR".split()
        ),
        "Tirosh et al. 2016, Science 352:189",
        ("cell cycle", "proliferation", "cycling"),
    ),
    Programme(
        "Interferon response",
        tuple(
            "ISG15 IFI27 IFI35 IFI44 IFI44L IFIT2 IFIT3 IRF7 MX1 OAS1 OASL RSAD2 CXCL10 CXCL11 PLSCR1 SAMD9L HERC6 "
            "CMPK2 USP18 DDX60 EPSTI1".split()
        ),
        "Hallmark interferon alpha response, Liberzon et al. 2015, Cell Systems 1:417",
        ("interferon", "ifn", "interferon-stimulated"),
    ),
    Programme(
        "NF-kB response",
        tuple("IL1B IL1A IL6 TNF CXCL1 CXCL2 CXCL3 CCL20 NFKBIA TNFAIP3 PTGS2 SOD2 BIRC3 ICAM1 CD83".split()),
        "Hallmark TNF signalling by NF-kB, Liberzon et al. 2015, Cell Systems 1:417",
        ("nf-kb", "nf-κb", "nfkb"),
    ),
    Programme(
        "Immediate-early response (often of dissociation)",
        tuple("FOS FOSB JUN JUNB EGR1 ATF3 IER2 DUSP1 ZFP36 SOCS3 HSPA1A HSPA1B DNAJB1".split()),
        "van den Brink et al. 2017, Nature Methods 14:935",
        ("immediate-early", "dissociation"),
    ),
    Programme(
        "Cytotoxicity",
        tuple("GNLY GZMB GZMK IFNG NKG7 GZMA PRF1".split()),
        "Smillie et al. 2019, Cell 178:714; GZMA and PRF1: Rooney et al. 2015, Cell 160:48",
        ("cytotoxicity", "cytotoxic"),
        T_AND_NK,
    ),
    Programme(
        "Activation-induced markers",
        tuple("CD69 CD40LG TNFRSF4 TNFRSF9 IL2RA CD274".split()),
        "Reiss et al. 2017, PLoS One 12:e0186998",
        ("activation", "activation markers"),
        T_AND_NK[:1] + T_AND_NK[2:],
    ),
    Programme(
        "Inhibitory receptors",
        tuple("CTLA4 PDCD1 TIGIT HAVCR2 LAG3".split()),
        "Smillie et al. 2019, Cell 178:714",
        ("inhibitory receptors", "exhaustion"),
        T_AND_NK[:1] + T_AND_NK[2:],
    ),
)


@dataclass(frozen=True)
class Lineage:
    """A lineage, with genes that hardly any cell outside the lineage expresses.

    Args:
        name: The cells of the lineage in words.
        term: Cell Ontology id of the lineage.
        genes: Symbols. The genes of T cells and of the B lineage encode receptor complexes that define these terms.
    """

    name: str
    term: str
    genes: tuple[str, ...]


LINEAGES = (
    Lineage("T cells", "CL:0000084", ("CD3D", "CD3E", "CD3G", "TRAC")),
    Lineage("the B lineage", "CL:0000945", ("CD19", "MS4A1", "CD79A", "CD79B")),
    Lineage("endothelial cells", "CL:0000115", ("CDH5", "VWF", "CLDN5")),
)
