message(WARNING "This package holds code for the instruction set of the machine that built it: "
  "configure with -DCOMMVQ_NATIVE=OFF to make one for others")
